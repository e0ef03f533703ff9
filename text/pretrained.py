"""The tokenizer of a Hugging Face directory, and what is kept of one in a checkpoint."""

import json
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from text import sentencepiece, vocabularies
from text.kinds import BYTES_JSON, MOST_IDS, Bytes, Published, Tokenizer, library_errors

LARGEST = 100_000_000  # bytes of a file; published ones have up to 34 MB
TEXTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
TOKEN_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
BYTE_LEVEL, WORDS, PIECES = ("vocab.json", "merges.txt"), "vocab.txt", "tokenizer.model"


def open_folder(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory.

    Of tokenizer.json, or else vocab.json and merges.txt, vocab.txt, or tokenizer.model.
    FileNotFoundError if there is none of them, ValueError for what is damaged or too large.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    files = {name: text for name in TEXTS if (text := read(folder / name)) is not None}
    model = read(folder / "config.json")
    try:
        if _is_ours(files.get("tokenizer.json", "")):
            return from_json(files["tokenizer.json"])
        usual = {} if "tokenizer.json" in files else _from_older(folder, files)
        return from_files(files, _ends(_object(model, "config.json")), usual)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def from_files(
    files: Mapping[str, str], ends: Sequence[int] = (), usual: Mapping[str, str] | None = None
) -> Tokenizer:
    """The tokenizer of the texts of files, by their names; a tokenizer.json among them.

    What is added to prompts is a matter of the tokenizer.json alone; add_bos_token of the
    tokenizer_config.json counts where the older files are read, as in transformers 5.
    `ends` are ids that end a generation beyond those which the files name, `usual` the special
    tokens that the files need not name.
    """
    config = _object(files.get("tokenizer_config.json"), "tokenizer_config.json")
    generation = _object(files.get("generation_config.json"), "generation_config.json")
    with library_errors("not a tokenizer.json"):
        made = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    if "added_tokens_decoder" in config:  # their properties; a token without an id gets none
        added = _added(files, config)
        made.add_tokens([t for i, t in added.items() if made.token_to_id(t.content) == i])
    specials = {**(usual or {}), **_specials(files, config)}
    _mark(made, [*specials.values(), *_others(files, config)])
    eos = made.token_to_id(specials.get("eos_token", ""))
    named = {*ends, *_ends(generation), *([] if eos is None else [eos])}
    return Published(
        made,
        came=files,
        specials=specials,
        ends=sorted(named),
        template=_template(files, config),
    )


def from_json(text: str) -> Tokenizer:
    """The tokenizer that `to_json` gave, or that a tokenizer.json holds; ValueError if neither."""
    if text.strip() == BYTES_JSON:
        return Bytes()
    if _is_ours(text):
        held = _object(text, "tokenizer.json")
        files = held.get("files")
        if isinstance(files, dict) and isinstance(files.get("tokenizer.json"), str):
            with library_errors("a damaged tokenizer"):
                return from_files(files, held.get("ends") or (), held.get("specials"))
    with library_errors("not a tokenizer.json"):
        return Published(tokenizers.Tokenizer.from_str(text))


def fits(tokenizer: Tokenizer, vocab: int) -> None:
    """Raise ValueError unless every id of a document is below `vocab`, the model's vocabulary.

    Published special tokens may lie beyond it: Gemma 3 of 1B has one for images that it lacks.
    """
    if tokenizer.plain > vocab:
        raise ValueError(
            f"a tokenizer of {tokenizer.plain} ids for a model whose vocabulary is {vocab}: "
            "they are not of the same checkpoint"
        )


def read(path: Path) -> str | None:
    """The text of a file, None if there is none; ValueError if it is no text of a sane size."""
    data = _bytes(path)
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None


def _bytes(path: Path) -> bytes | None:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise FileNotFoundError(f"{path} is a link to a file that is not there") from None
        return None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} must be a file")
    if found.st_size > LARGEST:
        raise ValueError(f"{path} has {found.st_size} bytes; no tokenizer has over {LARGEST}")
    return path.read_bytes()


def _from_older(folder: Path, files: dict[str, str]) -> dict[str, str]:
    """Add to `files` the folder's older vocabulary files, and the tokenizer.json they come to.

    Returns the special tokens that such files need not name.
    """
    config = _object(files.get("tokenizer_config.json"), "tokenizer_config.json")
    added = _added(files, config)
    vocab, merges, words = (read(folder / name) for name in (*BYTE_LEVEL, WORDS))
    model = None
    if vocab is not None and merges is not None:
        files.update(zip(BYTE_LEVEL, (vocab, merges), strict=True))
    elif words is not None:
        files[WORDS] = words
    elif (model := _bytes(folder / PIECES)) is None:
        looked = f"tokenizer.json, {' with '.join(BYTE_LEVEL)}, {WORDS} or {PIECES}"
        raise FileNotFoundError(f"{folder} has no tokenizer: neither {looked}")
    with library_errors("a damaged vocabulary"):
        if model is not None:
            made, usual = sentencepiece.convert(sentencepiece.read(model), _scheme(config), added)
        elif WORDS in files:
            made, usual = vocabularies.word_piece(words, config, added)
        else:
            made, usual = vocabularies.byte_level(vocab, merges, config, added)
        specials = usual | _specials(files, config)
        made.add_tokens([added[i] for i in sorted(added)])
        _mark(made, specials.values())
        if made.post_processor is None:
            known = made.get_vocab()
            asked = {k: n for k, n in specials.items() if n in known and config.get(f"add_{k}")}
            vocabularies.add_around(made, asked.get("bos_token"), asked.get("eos_token"))
    files["tokenizer.json"] = made.to_str()
    files.setdefault("tokenizer_config.json", json.dumps(usual, indent=2) + "\n")
    return usual


def _scheme(config: dict[str, Any]) -> str:
    """Which pieces of a text begin with SentencePiece's dummy prefix. sentencepiece.convert."""
    if config.get("add_prefix_space") is False:
        return "never"
    return "first" if config.get("legacy") is False else "always"


def _mark(made: tokenizers.Tokenizer, names: Iterable[str]) -> None:
    """Let these tokens be special, as far as they have an id."""
    special = {t.content for t in made.get_added_tokens_decoder().values() if t.special}
    for name in dict.fromkeys(names):
        if name not in special and made.token_to_id(name) is not None:
            made.add_tokens([AddedToken(name, normalized=False, special=True)])


def _specials(files: Mapping[str, str], config: dict[str, Any]) -> dict[str, str]:
    """The special tokens by the names of their kinds, "bos_token" and the like."""
    found = dict(config)
    if "added_tokens_decoder" not in config:  # files older than it have another that rules
        found |= _object(files.get("special_tokens_map.json"), "special_tokens_map.json")
    named = {kind: _content(value) for kind, value in found.items() if kind.endswith("_token")}
    return {kind: name for kind, name in named.items() if name is not None}


def _others(files: Mapping[str, str], config: dict[str, Any]) -> list[str]:
    """Special tokens that are of no kind."""
    found = []
    for held in (config, _object(files.get("special_tokens_map.json"), "special_tokens_map.json")):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            found += held[key] if isinstance(held.get(key), list) else []
    return [name for value in found if (name := _content(value)) is not None]


def _content(value: Any) -> str | None:
    """The name of a token: a string, or an object that has it."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _added(files: Mapping[str, str], config: dict[str, Any]) -> dict[int, AddedToken]:
    """Tokens with their ids from added_tokens_decoder or added_tokens.json."""
    special = set(_specials(files, config).values())
    listed = config.get("added_tokens_decoder")
    if listed is None:
        older = _object(files.get("added_tokens.json"), "added_tokens.json")
        listed = {i: {"content": name, "special": name in special} for name, i in older.items()}
    try:
        tokens = {int(i): _token(entry) for i, entry in listed.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"added tokens that are no tokens with their ids: {error}") from None
    wrong = next((i for i in tokens if not 0 <= i < MOST_IDS), None)
    if wrong is not None:
        raise ValueError(f"added token {tokens[wrong].content!r} with id {wrong}")
    return tokens


def _token(entry: dict[str, Any]) -> AddedToken:
    return AddedToken(**{key: value for key, value in entry.items() if key in TOKEN_FIELDS})


def _template(files: Mapping[str, str], config: dict[str, Any]) -> str | None:
    """The chat template; of several by name, "default"."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"]
    found = config.get("chat_template")
    if isinstance(found, list):
        named = (part for part in found if isinstance(part, dict))
        found = next(
            (part.get("template") for part in named if part.get("name") == "default"), None
        )
    return found if isinstance(found, str) else None


def _ends(config: dict[str, Any]) -> list[int]:
    """The ids of eos_token_id: one, several or none. A model that also sees has two configs."""
    parts = [config, config.get("text_config")]
    values = [part.get("eos_token_id") for part in parts if isinstance(part, dict)]
    ids = [i for value in values for i in (value if isinstance(value, list) else [value])]
    return [i for i in ids if type(i) is int and i >= 0]


def _is_ours(text: str) -> bool:
    """Whether a tokenizer.json is what `to_json` gave for files."""
    return text.lstrip().startswith('{"meshlm"')


def _object(text: str | None, name: str) -> dict[str, Any]:
    """The JSON object of a file, empty if there is no file."""
    try:
        found = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} must be a JSON object, not {type(found).__name__}")
    return found
