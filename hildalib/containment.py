"""The inside of `hildalib.sandbox`: a process that gives up its rights, then is judge or candidate. Standard library only.

Run as a script, never imported by the product but for its constants. The candidate executes model-written code and answers
calls; the judge executes the tests and calls the candidate as its functions. Values cross as JSON, so that neither the tests
nor the verdict are ever in the candidate's memory. Entry points: `main`, `contain`, `encode`, `decode`, `SYSCALLS`.
"""

import builtins
import ctypes
import json
import os
import struct
import sys
import types

PASSED, FAILED, REFUSED, NOT_READY = 0, 1, 77, 78  # exit statuses of the judge; 77 also of a candidate that cannot be contained
LINE = 8 << 20  # bytes of one message: the largest value of HumanEval and MBPP has some kilobytes
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SIGKILL = 1, 4, 22, 38, 9

# System calls a computing Python needs, as (x86_64, aarch64) numbers; -1: not there. Everything else fails with EPERM: no new process or
# thread, no program start, socket, signal to anybody, trace, limit or mode change, mount, key, io_uring. ioctl and fcntl: some commands.
SYSCALLS = {
    "read": (0, 63), "write": (1, 64), "open": (2, -1), "close": (3, 57), "stat": (4, -1), "fstat": (5, 80), "lstat": (6, -1), "poll": (7, -1),
    "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66),
    "access": (21, -1), "pipe": (22, -1), "select": (23, -1), "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23),
    "dup2": (33, -1), "pause": (34, -1), "nanosleep": (35, 101), "getpid": (39, 172), "exit": (60, 93), "uname": (63, 160), "fsync": (74, 82),
    "fdatasync": (75, 83), "ftruncate": (77, 46), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "rename": (82, -1), "unlink": (87, -1),
    "readlink": (89, -1), "umask": (95, 166), "gettimeofday": (96, 169), "getrusage": (98, 165), "times": (100, 153), "getuid": (102, 174),
    "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177), "getppid": (110, 173), "sigaltstack": (131, 132), "gettid": (186, 178),
    "futex": (202, 98), "sched_getaffinity": (204, 123), "getdents64": (217, 61), "restart_syscall": (219, 128), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94), "openat": (257, 56), "newfstatat": (262, 79),
    "unlinkat": (263, 35), "renameat": (264, 38), "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73),
    "set_robust_list": (273, 99), "dup3": (292, 24), "pipe2": (293, 59), "renameat2": (316, 276), "getrandom": (318, 278), "membarrier": (324, 283),
    "statx": (332, 291), "rseq": (334, 293), "faccessat2": (439, 439)}
# Without F_SETOWN, FIOASYNC and their kin, with which the kernel can be made to signal another process, and without terminal input.
COMMANDS = {(16, 29): (0x5401, 0x5451, 0x5450, 0x541B),  # ioctl: TCGETS, FIOCLEX, FIONCLEX, FIONREAD
            (72, 25): (0, 1, 2, 3, 1030)}  # fcntl: F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH, column of the tables above


class Refused(Exception):
    """This process cannot be contained, and why."""


class Gone(BaseException):
    """The candidate does not answer any more; not an Exception, so that no test takes it for one."""


# ---- containment --------------------------------------------------------------------------------------------------------------------

def _call(name: str, *arguments) -> int:
    """A C library function, or with a number a system call, whose failure is Refused. Whole numbers are passed as long."""
    library = ctypes.CDLL(None, use_errno=True)
    converted = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = getattr(library, name)(*converted)
    if result < 0:
        raise Refused(f"{name}{arguments[0] if name == 'syscall' else ''}: {os.strerror(ctypes.get_errno())}")
    return result


def _readable() -> list[str]:
    """Folders of the standard library and the shared libraries, none below another. All the file system that is left."""
    library = os.path.dirname(os.__file__)
    wanted = {library, os.path.dirname(library), "/lib", "/lib64", "/usr/lib", "/usr/lib64"} | {path for path in sys.path if path}
    found = sorted(path for path in wanted if os.path.isdir(path) and path != "/")
    return [path for path in found if not any(path.startswith(other + "/") for other in found)]


def _enter_namespaces(root: str, readable: list[str], disk_bytes: int) -> None:
    """Own users, mounts, network (no device), IPC; the file system is a small tmpfs and, read-only, `readable`."""
    uid, gid = os.geteuid(), os.getegid()
    _call("unshare", 0x10000000 | 0x00020000 | 0x40000000 | 0x08000000 | 0x04000000)  # CLONE_NEWUSER, NS, NET, IPC, UTS
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="utf-8") as file:
            file.write(text)
    _call("mount", None, b"/", None, 0x4000 | 0x40000, None)  # MS_REC | MS_PRIVATE: nothing spreads to the outside
    _call("mount", b"tmpfs", root.encode(), b"tmpfs", 2 | 4 | 8, f"size={disk_bytes},nr_inodes=1000,mode=755".encode())  # MS_NOSUID, NODEV, NOEXEC
    for path in readable:
        inside = (root + path).encode()
        os.makedirs(inside)
        _call("mount", os.path.realpath(path).encode(), inside, None, 0x1000 | 0x4000, None)  # MS_BIND | MS_REC
        _call("syscall", 442, -100, inside, 0x8000, struct.pack("4Q", 1 | 2 | 4, 0, 0, 0), 32)  # mount_setattr, recursive: read-only, nosuid, nodev
    os.mkdir(f"{root}/work")
    os.chdir(root)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", 2)  # MNT_DETACH: the old root, which lies on top of the new one
    os.chdir("/work")


def _landlock(readable: list[str]) -> None:
    """Landlock, ABI 3 (Linux 6.2) or later: before it truncate() was free. Only `readable` may be read, only files right here written."""
    abi = _call("syscall", 444, None, 0, 1)
    if abi < 3:
        raise Refused(f"Landlock ABI {abi}, 3 is needed")
    rights = (1 << (16 if abi >= 5 else 15)) - 1
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _call("syscall", 444, struct.pack("3Q", rights, 3, 3)[:size], size, 0)  # no TCP, no abstract sockets, no signals
    read, write = 1 << 2 | 1 << 3, 1 << 1 | 1 << 5 | 1 << 8 | 1 << 14  # READ_FILE, READ_DIR; WRITE_FILE, REMOVE_FILE, MAKE_REG, TRUNCATE
    for path, allowed in [*((path, read) for path in readable), (".", read | write)]:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _call("syscall", 445, ruleset, 1, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
    _call("syscall", 446, ruleset, 0)
    os.close(ruleset)


def _filter(machine: str) -> bytes:
    """The seccomp program: a foreign architecture kills, `SYSCALLS` and `COMMANDS` pass, the rest is EPERM."""
    if machine not in MACHINES:
        raise Refused(f"no table of system calls for {machine}")
    architecture, column = MACHINES[machine]
    load, equal, back, allow, deny = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050001
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (back, 0, 0, 0x80000000), (load, 0, 0, 0)]
    for numbers in SYSCALLS.values():
        if numbers[column] >= 0:
            program += [(equal, 0, 1, numbers[column]), (back, 0, 0, allow)]
    for numbers, commands in COMMANDS.items():
        program += [(equal, 0, 2 * len(commands) + 2, numbers[column]), (load, 0, 0, 24)]  # the low half of the second argument
        program += [line for command in commands for line in ((equal, 0, 1, command), (back, 0, 0, allow))] + [(back, 0, 0, deny)]
    return b"".join(struct.pack("HBBI", *line) for line in [*program, (back, 0, 0, deny)])


def _limit(limits: dict[str, int]) -> None:
    """Hard limits of this process: CPU seconds, bytes of address space and of a file; no core file, no new process, few open files."""
    import resource

    for name, value in {"AS": limits["memory"], "CPU": limits["cpu"], "FSIZE": limits["file"], "CORE": 0, "NPROC": 0, "NOFILE": 64}.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def contain(root: str, limits: dict[str, int], layers: list[str]) -> list[str]:
    """Gives up, for good, whatever a computation does not need; returns the file-system layers that hold. Refused if none does.

    root: an empty folder, the working directory from now on. layers: "namespaces" and "landlock", tried in this order; one is enough.
    """
    if not sys.platform.startswith("linux"):
        raise Refused(f"no containment on {sys.platform}")
    os.chdir(root)
    readable, holding, failures = _readable(), [], []
    program = _filter(os.uname().machine)
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for layer in layers:
        try:
            if layer == "namespaces":
                _enter_namespaces(root, readable, limits["disk"])
            else:
                _landlock(readable)
            holding.append(layer)
        except (Refused, OSError) as error:
            failures.append(f"{layer}: {error}")
    if not holding:
        raise Refused("; ".join(failures) or "nothing keeps files away")
    _call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))  # version 3, this process: not one capability, even of root
    _limit(limits)
    _call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    _call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)  # after the capabilities, whose change clears it
    place = ctypes.create_string_buffer(program, len(program))
    _call("prctl", PR_SET_SECCOMP, 2, struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(place)), 0, 0)
    return holding


# ---- values -------------------------------------------------------------------------------------------------------------------------

_SHAPES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value, keep):
    """JSON of a value: None, bool, int, float, str as they are, containers as [shape, items]; `keep(value)` numbers any other object.

    Subclasses cross as their base: what compares equal to everything is just a value on the other side.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return ["dict", [[encode(key, keep), encode(item, keep)] for key, item in dict.items(value)]]
    for name, shape in _SHAPES.items():
        if isinstance(value, shape):
            return [name, [encode(item, keep) for item in shape.__iter__(value)]]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, bytes):
        return ["bytes", value.decode("latin-1")]
    return ["object", keep(value)]


def decode(data, find):
    """The value that `encode` wrote; `find(number)` gives an object. Raises on anything else."""
    if not isinstance(data, list):
        return data
    name, items = data
    if name == "dict":
        return {decode(key, find): decode(item, find) for key, item in items}
    if name in _SHAPES:
        return _SHAPES[name](decode(item, find) for item in items)
    return {"complex": lambda pair: complex(*pair), "bytes": lambda text: text.encode("latin-1"), "object": find}[name](items)


class Link:
    """Messages, one a line, between judge and candidate."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    def send(self, message) -> None:
        try:
            self.writer.write(json.dumps(message).encode() + b"\n")
            self.writer.flush()
        except OSError as error:
            raise Gone("the candidate ended") from error

    def receive(self):
        line = self.reader.readline(LINE)
        if not line.endswith(b"\n"):
            raise Gone("the candidate ended" if len(line) < LINE else "an answer was too long")
        return json.loads(line)


# ---- the two roles ------------------------------------------------------------------------------------------------------------------

def candidate(link: Link) -> None:
    """Loads the code that the first call brings, then answers calls until there are no more."""
    module, objects = types.ModuleType("candidate"), []
    sys.modules["candidate"] = module  # dataclasses look their module up

    def keep(value) -> int:
        objects.append(value)
        return len(objects) - 1

    def find(number: int):
        return objects[number]

    actions = {"load": lambda code: exec(compile(code, "<candidate>", "exec"), module.__dict__),
               "name": lambda name: ["object", keep(getattr(module, name))],
               "call": lambda function, arguments, named: function(*arguments, **named), "get": getattr, "set": setattr, "list": list}
    link.send("ready")
    while True:
        action, arguments = link.receive()
        try:
            value = actions[action](*decode(arguments, find))
            reply = ["value", value if action == "name" else encode(value, keep)]
        except BaseException as error:
            reply = ["error", type(error).__name__, _text(error)]
        link.send(reply)


def _text(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except BaseException:
        return ""


class Remote:
    """An object of the candidate, seen from the judge: it can be called, iterated, and its attributes read and written; equal to itself only."""

    __slots__ = ("_number", "_ask")

    def __init__(self, number: int, ask):
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_ask", ask)

    def __call__(self, *arguments, **named):
        return self._ask("call", self, arguments, named)

    def __iter__(self):
        return iter(self._ask("list", self))

    def __getattr__(self, name: str):
        return self._ask("get", self, name)

    def __setattr__(self, name: str, value) -> None:
        self._ask("set", self, name, value)


def judge(link: Link) -> None:
    """Executes the tests, whose free names are the candidate's. Returns if every one passed, else raises."""
    task = link.receive()
    try:
        ready = link.receive() == "ready"
    except Gone:
        ready = False
    if not ready:
        os._exit(NOT_READY)

    def number(value) -> int:
        if not isinstance(value, Remote):
            raise TypeError(f"a {type(value).__name__} cannot be passed to the candidate")
        return value._number

    def ask(action: str, *arguments):
        link.send([action, encode(arguments, number)])
        kind, *content = link.receive()
        if kind == "value":
            return decode(content[0], lambda place: Remote(place, ask))
        error = getattr(builtins, str(content[0]), None)
        known = isinstance(error, type) and issubclass(error, Exception)
        raise (error if known else RuntimeError)(content[1] if known else f"{content[0]}: {content[1]}")

    ask("load", task["code"])
    space = {"__name__": "tests"}
    exec(compile(task["setup"], "<setup>", "exec"), space)
    space |= {name: ask("name", name) for name in task["names"]}
    exec(compile(task["tests"], "<tests>", "exec"), space)
    ask("list", ())  # a candidate that died in a test which expects errors did not pass


def main() -> None:
    """argv[1]: JSON {"role", "root", "contained", "layers", "limits"}. Descriptor 0 hears the other side, 1 speaks to it, 2 is output."""
    settings = json.loads(sys.argv[1])
    link = Link(os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb"))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)  # what is printed is output, never a message
    try:
        if settings["contained"]:
            contain(settings["root"], settings["limits"], settings["layers"])
        elif os.name == "posix":
            os.chdir(settings["root"])
    except Exception as error:
        print(f"{error}", file=sys.stderr)
        os._exit(REFUSED)
    try:
        (candidate if settings["role"] == "candidate" else judge)(link)
    except BaseException as error:
        if settings["role"] == "judge":
            print(f"{type(error).__name__}: {_text(error)}", file=sys.stderr)
        os._exit(FAILED)
    os._exit(PASSED)


if __name__ == "__main__":
    main()
