"""Events: one TensorBoard event file, with scalars and text.

The records are made by the `tensorboard` package without TensorFlow. `RecordWriter` and not
`EventFileWriter`, which would import TensorFlow where it is installed and write from a thread.
"""

import io
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from monitor.append import AppendFile


class Events:
    """An event file in `folder`. Events of earlier files at `first_step` or later are void."""

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        seconds, nanos = divmod(time.time_ns(), 10**9)
        name = (
            f"events.out.tfevents.{seconds:010d}.{nanos:09d}.{socket.gethostname()}.{os.getpid()}"
        )
        self._file = AppendFile(folder / name)
        self._write(event_pb2.Event(file_version="brain.Event:2"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(event_pb2.Event(step=first_step, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point at `step` for each tag."""
        points = [summary_pb2.Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        self._write(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=points)))

    def text(self, step: int, tag: str, text: str) -> None:
        """`text`, shown as it is: TensorBoard would read bare text as Markdown."""
        fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", text))])
        block = f"{fence}\n{text}\n{fence}".encode(errors="replace")
        plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name="text")
        value = summary_pb2.Summary.Value(
            tag=tag,
            metadata=summary_pb2.SummaryMetadata(plugin_data=plugin),
            tensor=tensor_pb2.TensorProto(
                dtype=types_pb2.DT_STRING,
                tensor_shape=tensor_shape_pb2.TensorShapeProto(),
                string_val=[block],
            ),
        )
        self._write(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=[value])))

    def close(self) -> None:
        """Close the file; every event is in it already."""
        self._file.close()

    def _write(self, event: event_pb2.Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.write(record.getvalue())
