"""What strace saw: the calls of all processes and threads that changed files below a directory, in order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TRACED = (
    "open,openat,openat2,creat,write,pwrite64,writev,pwritev,pwritev2,ftruncate,truncate,fallocate,fsync,fdatasync,"
    "sync_file_range,rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat,rmdir,symlink,symlinkat,link,linkat,"
    "chmod,fchmod,fchmodat,chown,fchown,lchown,fchownat,utimensat,setxattr,fsetxattr,mknod,mknodat,copy_file_range,"
    "sendfile,splice,mmap"
)
_LINE = re.compile(r"(?P<pid>\d+)\s+(?P<rest>.*)")
_CALL = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)\)\s+= (?P<result>-?\d+|\?)")
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>(?P<rest>.*)")
_TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"')
_DESCRIPTOR = re.compile(r"^\d+<([^>]*)>")
_WRITES = ("write", "pwrite64", "writev", "pwritev", "pwritev2", "copy_file_range", "sendfile", "splice")
_SYNCS = ("fsync", "fdatasync", "sync_file_range")
_BY_PATH = {
    "mkdir": "mkdir",
    "mkdirat": "mkdir",
    "unlink": "unlink",
    "rmdir": "rmdir",
    "truncate": "truncate",
    "symlink": "symlink",
    "symlinkat": "symlink",
}
_BY_DESCRIPTOR = {
    **dict.fromkeys(_WRITES, "write"),
    **dict.fromkeys(_SYNCS, "fsync"),
    "ftruncate": "truncate",
    "fallocate": "write",
}


@dataclass(frozen=True)
class Change:
    """One change; `kind` is that of `store.Operation`, with every open that may create or cut a file as "create"."""

    kind: str
    path: str
    target: str = ""
    num_bytes: int = 0


def command(output: Path) -> list[str]:
    """To be put before a command: traces it with all its children."""
    return ["strace", "-f", "-y", "-s", "0", "-qq", "--seccomp-bpf", "-e", f"trace={TRACED}", "-o", str(output)]


def changes_below(output: Path, root: Path) -> list[Change]:
    """Calls that were made (also those that failed), by the time they began."""
    changes = (change for text in _calls(output) if str(root) in text and (change := _parse(text)))
    return [change for change in changes if change.path == str(root) or change.path.startswith(f"{root}/")]


def _calls(output: Path) -> Iterator[str]:
    """Each call on one line, where it began."""
    begun: dict[str, int] = {}
    calls: list[str] = []
    for line in output.read_text(errors="replace").splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        pid, rest = match["pid"], match["rest"]
        resumed = _RESUMED.match(rest)
        if resumed is not None:
            if pid in begun:
                calls[begun.pop(pid)] += resumed["rest"]
        elif rest.endswith("<unfinished ...>"):
            begun[pid] = len(calls)
            calls.append(rest.removesuffix("<unfinished ...>").rstrip())
        else:
            calls.append(rest)
    yield from calls


def _parse(text: str) -> Change | None:
    """None for a call that changes nothing."""
    match = _CALL.match(text)
    if match is None:
        return None
    name, arguments, result = match["name"], match["arguments"], match["result"]
    paths = _TEXT.findall(arguments)
    held = _DESCRIPTOR.match(arguments)
    if name in _BY_DESCRIPTOR:
        path = held[1].removesuffix(" (deleted)") if held else ""
        num_bytes = int(result) if name in _WRITES and result.isdigit() else 0
        return Change(_BY_DESCRIPTOR[name], path, num_bytes=num_bytes)
    if name in ("open", "openat", "openat2", "creat"):
        creates = name == "creat" or "O_CREAT" in arguments or "O_TRUNC" in arguments
        return Change("create", paths[0]) if creates else None
    if name == "mmap":
        return Change("write", _mapped(arguments)) if "PROT_WRITE" in arguments and "MAP_SHARED" in arguments else None
    if name.startswith("rename"):
        return Change("rename", paths[0], paths[1])
    if name == "unlinkat":
        return Change("rmdir" if "AT_REMOVEDIR" in arguments else "unlink", paths[0])
    if name.startswith("symlink"):
        return Change("symlink", paths[1], paths[0])
    if name in _BY_PATH:
        return Change(_BY_PATH[name], paths[0])
    return Change(name, paths[0] if paths else held[1] if held else "")  # a change that the store does not know


def _mapped(arguments: str) -> str:
    found = re.search(r", \d+<([^>]*)>", arguments)
    return found[1] if found else ""
