"""The processes of a run: how they find each other, stop together, and learn who is lost.

Process 0 runs a hub, and every process, 0 as well, is its member. JAX has such a service too, which
its collectives need, but that one ends a process from C++, without an exit code or a name.
"""
