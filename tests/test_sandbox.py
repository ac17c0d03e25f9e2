"""The sandbox: hostile programs do nothing outside and do not pass, honest ones do; where it cannot contain, it refuses."""

import json
import os
import re
import struct
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hildalib import HildaError, containment, sandbox

HERE, WHY = sandbox.available()
contained = pytest.mark.skipif(not HERE, reason=f"code cannot be contained here: {WHY}")
KINDS = [("namespaces",), ("landlock",)]
TESTS = "assert f(20) == 41\nassert f(21) == 43"


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder with the file "kept"; afterwards it is as it was, the sandbox left no file and no process."""
    folder, temporary = tmp_path / "outside", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()
    (folder / "kept").write_text("kept", encoding="utf-8")
    (folder / "kept").chmod(0o644)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield folder
    assert [path.name for path in folder.iterdir()] == ["kept"] and (folder / "kept").read_text(encoding="utf-8") == "kept"
    assert (folder / "kept").stat().st_mode & 0o777 == 0o644 and (folder / "kept").stat().st_nlink == 1
    assert list(temporary.iterdir()) == []
    for process in psutil.process_iter():
        try:
            assert str(temporary) not in " ".join(process.cmdline())
        except psutil.Error:
            continue


def use(monkeypatch, kind):
    """The sandbox with only the layers `kind`; skips where they do not hold."""
    monkeypatch.setattr(sandbox, "LAYERS", kind)
    held, why = sandbox._probe.__wrapped__()
    monkeypatch.setattr(sandbox, "_probe", lambda: (held, why))
    if not held:
        pytest.skip(f"{'+'.join(kind)} does not hold here: {why}")


# ---- what one call after another tries and must not get -----------------------------------------------------------------------------------
# Chosen to harm nobody should they succeed: signal 0, the same host name, an empty mount over the test's own folder.

ESCAPES = """
import ctypes, fcntl, os, resource, socket, subprocess, threading
libc = ctypes.CDLL(None, use_errno=True)
def check(result):
    if result < 0: raise OSError(ctypes.get_errno(), "refused")
def attempts(out, pid):
    kept = out + "/kept"
    return {
        "read outside": lambda: open(kept).read(), "list outside": lambda: os.listdir(out), "write outside": lambda: open(out + "/new", "w"),
        "overwrite outside": lambda: open(kept, "w"), "append outside": lambda: open(kept, "a"), "delete outside": lambda: os.remove(kept),
        "delete by its folder": lambda: os.unlink("kept", dir_fd=os.open(out, os.O_RDONLY)), "truncate outside": lambda: os.truncate(kept, 0),
        "rename outside": lambda: os.rename(kept, out + "/gone"), "change mode": lambda: os.chmod(kept, 0o777),
        "change owner": lambda: os.chown(kept, 1, 1),
        "change time": lambda: os.utime(kept, (0, 0)), "hard link": lambda: os.link(kept, "mine"), "symbolic link": lambda: os.symlink(kept, "mine2"),
        "make a folder outside": lambda: os.mkdir(out + "/new"), "home": lambda: os.listdir(os.path.expanduser("~root")),
        "/etc": lambda: open("/etc/passwd"),
        "/tmp": lambda: open("/tmp/hilda-escape", "w"), "/dev/shm": lambda: open("/dev/shm/hilda-escape", "w"),
        "up the tree": lambda: open("../" * 30 + "etc/passwd"),
        "write the library": lambda: open(os.__file__, "a"), "environment of the parent": lambda: open(f"/proc/{pid}/environ", "rb"),
        "memory of the parent": lambda: open(f"/proc/{pid}/mem", "rb"), "descriptors": lambda: os.listdir("/proc/self/fd"),
        "fork": lambda: os.fork() or os._exit(0), "vfork": lambda: subprocess.run(["/bin/true"]), "shell": lambda: 1 / (os.system("true") == 0),
        "exec": lambda: os.execv("/bin/true", ["true"]), "thread": lambda: threading.Thread(target=int).start(), "setsid": os.setsid,
        "internet socket": lambda: socket.socket(), "unix socket": lambda: socket.socket(socket.AF_UNIX), "socket pair": socket.socketpair,
        "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW), "kill the parent": lambda: os.kill(os.getppid(), 0),
        "kill the caller": lambda: os.kill(pid, 0), "kill everybody": lambda: os.kill(-1, 0),
        "kill the group": lambda: os.killpg(0, 0), "signal by descriptor": lambda: fcntl.fcntl(2, fcntl.F_SETOWN, pid),
        "signal by ioctl": lambda: fcntl.ioctl(2, 0x8901, b"1234"), "limits of the parent": lambda: resource.prlimit(pid, resource.RLIMIT_CPU),
        "own limits": lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)), "priority": lambda: os.setpriority(os.PRIO_PROCESS, pid, 19),
        "affinity": lambda: os.sched_setaffinity(pid, os.sched_getaffinity(0)), "trace": lambda: check(libc.ptrace(0, 0, 0, 0)),
        "become root": lambda: os.setuid(0),
        "mount": lambda: check(libc.mount(b"none", out.encode(), b"tmpfs", 0, None)), "namespaces": lambda: check(libc.unshare(0x10000000)),
        "chroot": lambda: os.chroot("."), "io_uring": lambda: check(libc.syscall(425, 1, bytes(120))),
        "bpf": lambda: check(libc.syscall(321, 0, bytes(64), 64)),
        "new filter": lambda: check(libc.prctl(22, 0, 0, 0, 0)), "parent death": lambda: check(libc.prctl(1, 0, 0, 0, 0)),
        "shared memory": lambda: check(libc.shmget(0, 4096, 0o1600)),
        "host name": lambda: check(libc.sethostname(os.uname().nodename.encode(), len(os.uname().nodename))),
        "terminal input": lambda: fcntl.ioctl(2, 0x5412, b"x"), "a gigabyte": lambda: bytearray(1 << 30)}
def got(out, pid):
    found = []
    for name, attempt in attempts(out, pid).items():
        try:
            attempt()
        except (OSError, RuntimeError, MemoryError, ValueError, ZeroDivisionError):
            continue
        found.append(name)
    return found
"""


@contained
@pytest.mark.parametrize("kind", KINDS, ids="+".join)
def test_no_escape_succeeds_under_either_layer_alone(kind, outside, monkeypatch):
    use(monkeypatch, kind)
    result = sandbox.run(ESCAPES, f"found = got({str(outside)!r}, {os.getpid()})\nassert found == [], found", ["got"])
    assert result.ok, result.reason
    assert not Path("/tmp/hilda-escape").exists() and not Path("/dev/shm/hilda-escape").exists()


@contained
def test_every_escape_is_a_real_one():
    """Without containment the same attempts that need no luck succeed, so that their failure above says something."""
    harmless = {"read outside", "list outside", "write outside", "append outside", "change mode", "hard link", "symbolic link", "/etc", "fork",
                "vfork", "shell", "thread", "internet socket", "unix socket", "socket pair", "descriptors", "signal by descriptor"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kept").write_text("kept", encoding="utf-8")
        code = ESCAPES.replace("in attempts(out, pid).items()", f"in [(n, a) for n, a in attempts(out, pid).items() if n in {harmless!r}]")
        tests = f"found = got({folder!r}, {os.getpid()})\nassert set(found) == {harmless!r}, found"
        task = {"code": code, "setup": "", "names": ["got"], "tests": tests}
        result = sandbox._execute(task, 10.0, 4096, contained=False)
    assert result.ok, result.reason


# ---- hostile programs ------------------------------------------------------------------------------------------------------------------------

HOSTILE = {
    "wrong": "def f(x): return x",
    "no program": "I am sorry, but",
    "empty": "",
    "null characters": "\0",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "thread bomb": "import _thread\nwhile True:\n    try: _thread.start_new_thread(int, ())\n    except RuntimeError: pass",
    "endless loop": "def f(x):\n    while True: pass",
    "endless sleep": "import time\ndef f(x): time.sleep(1000)",
    "endless pause": "import signal\ndef f(x): signal.pause()",
    "ignored signals": "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
                       "def f(x):\n    while True: pass",
    "swallowed interrupts": "def f(x):\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass",
    "own session": "import os\ntry: os.setsid()\nexcept OSError: pass\ntry: os.fork()\nexcept OSError: pass\nwhile True: pass",
    "endless output": "while True: print('passed ' * 1000)",
    "endless errors": "import sys\nwhile True: sys.stderr.write('x' * 100000)",
    "a gigabyte": "def f(x): return len(bytearray(1 << 30)) and 41",
    "memory by steps": "held = []\nwhile True: held.append(bytearray(1 << 20))",
    "a gigabyte of answer": "def f(x): return 'x' * (1 << 25)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x) + 1",
    "deep answer": "def f(x):\n    a = []\n    for _ in range(100000): a = [a]\n    return a",
    "circular answer": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "huge number": "def f(x): return 10 ** 100000",
    "huge literal": "x = " + "(" * 100_000,
    "crash": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "abort": "import os\ndef f(x): os.abort()",
    "large file": "def f(x):\n    with open('a', 'wb') as file:\n        while True: file.write(bytes(1 << 20)); file.flush()",
    "many files": "import itertools\ndef f(x):\n    for i in itertools.count(): open(f'{i}', 'wb').write(bytes(1 << 19))",
    "many descriptors": "import os\nheld = []\nwhile True: held.append(os.dup(0))",
    "closed output": "import os, sys\nsys.stdout.close()\nsys.stderr.close()\nos.close(1)\nos.close(2)",
    "closed everything": "import os\nos.closerange(0, 1000)",
    "closed when called": "import os\ndef f(x): os.closerange(0, 1000)",
    "printed verdict": "print('passed')\nprint('Result(ok=True)')\ndef f(x): print('passed', flush=True)",
    "_exit 0": "import os\nos._exit(0)",
    "_exit 0 when called": "import os\ndef f(x): os._exit(0)",
    "_exit as if refused": "import os\nos._exit(77)",
    "_exit as if not ready": "import os\nos._exit(78)",
    "sys.exit": "import sys\nsys.exit(0)",
    "sys.exit when called": "import sys\ndef f(x): sys.exit(0)",
    "SystemExit": "def f(x): raise SystemExit(0)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
    "equal to everything": "class A:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
                           "    __hash__ = None\ndef f(x): return A()",
    "a number equal to everything": "class A(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef f(x): return A(0)",
    "a list equal to everything": "class A(list):\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "text of a number": "def f(x): return str(2 * x + 1)",
    "changed harness": "import builtins, sys, json, os\nm = sys.modules['__main__']\n"
                       "for n in ('judge', 'candidate', 'encode', 'decode', 'main', 'PASSED', 'FAILED'):\n"
                       "    setattr(m, n, 0)\nm.Link.send = lambda *a: None\nbuiltins.AssertionError = type('E', (BaseException,), {})\n"
                       "builtins.exec = print\njson.dumps = print",
    "changed equality": "import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.all = lambda x: True\ndef f(x): return 0",
    "expected values in memory": "import gc, sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
                                "        if 'tests' in frame.f_locals: return 41 + 2 * (x - 20)\n"
                                 "        frame = frame.f_back\n"
                                "    if any(isinstance(o, str) and 'assert' in o and 'f(' + '20)' in o for o in gc.get_objects()): return 2 * x + 1\n"
                                 "    return 0",
    "forged messages": "import json, os\nfor d in range(3, 64):\n"
                       "    for m in (['value', None], ['value', True], ['verdict', 'passed'], 'passed', 0):\n"
                       "        try: os.write(d, json.dumps(m).encode() + b'\\n')\n        except OSError: pass\ndef f(x): return 0",
    "forged objects": "import os\nfor d in range(3, 64):\n    try: os.write(d, b'[\"value\", [\"object\", {}]]\\n' * 9)\n"
                      "    except OSError: pass\ndef f(x): return f",
    "eaten calls": "import os\nfor d in range(3, 64):\n    try: os.read(d, 1 << 20)\n    except OSError: pass",
    "standard input": "def f(x): return input()",
    "error with a hostile text": "class E(Exception):\n    def __str__(self): raise SystemExit\ndef f(x): raise E",
    "error that is no Exception": "class E(BaseException): pass\ndef f(x): raise E",
    "assertion of its own": "def f(x): raise AssertionError('passed')",
    "third-party module": "import torch\ndef f(x): return 2 * x + 1",
}
ENDLESS = {"fork bomb", "thread bomb", "endless loop", "endless sleep", "endless pause", "ignored signals", "swallowed interrupts", "own session",
           "deep recursion", "changed harness", "eaten calls"}  # they are waited for


@contained
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_does_nothing_and_does_not_pass(name, outside):
    result = sandbox.run(HOSTILE[name], TESTS, ["f"], seconds=0.25 if name in ENDLESS else 4)
    assert not result.ok and result.reason != "passed"
    assert len(result.output) <= sandbox.OUTPUT_BYTES


@contained
def test_a_candidate_that_dies_where_the_test_expects_an_error_does_not_pass():
    tests = "try:\n    f(0)\nexcept:\n    pass\n"
    assert not sandbox.run("import os\ndef f(x): os._exit(0)", tests, ["f"]).ok
    assert sandbox.run("def f(x): raise ValueError", tests, ["f"]).ok


@contained
def test_disk_space_is_bounded_without_a_file_system_of_its_own(monkeypatch, outside):
    use(monkeypatch, ("landlock",))
    result = sandbox.run(HOSTILE["many files"], TESTS, ["f"], seconds=4)
    assert result.reason == f"wrote more than {sandbox.DISK_BYTES >> 20} MB" or "OSError" in result.reason


# ---- honest programs -------------------------------------------------------------------------------------------------------------------------

@contained
def test_an_honest_program_passes_and_its_output_is_kept():
    result = sandbox.run("import math\nprint('häl', end='')\ndef f(x): return 2 * x + int(math.cos(0))", TESTS, ["f"])
    assert (result.ok, result.output, result.reason) == (True, "häl", "passed") and result.seconds > 0


@contained
def test_values_errors_classes_and_the_working_folder_cross():
    code = ("import dataclasses, os\n@dataclasses.dataclass\nclass Pair:\n    a: int\n    b: int\n"
            "def total(pairs): return sum(p.a + p.b for p in pairs)\n"
            "def same(x): return x\n"
            "def fail(name): raise getattr(__builtins__, name, None) or __builtins__[name]('no')\n"
            "def lazy(): return (i for i in range(3))\n"
            "def note(text):\n    with open('note', 'w') as file: file.write(text)\n"
            "    with open('note') as file: return file.read() + str(len(os.listdir()))")
    tests = ("assert total([Pair(1, 2), Pair(3, b=4)]) == 10\nroot = Pair(1, 2)\nroot.a = 5\nassert total([root]) == 7 and root.a == 5\n"
             "for x in (None, True, 1, 1.5, float('inf'), 'a\\ud800', b'\\xff', [1, (2, 3)], {1, 2}, frozenset({3}),\n"
             "          {(1, 2): [None]}, 1 + 2j, -0.0, set(), ()):\n"
             "    assert same(x) == x and type(same(x)) is type(x)\nassert same(True) is True and same(None) is None\n"
             "try:\n    fail('KeyError')\n    assert False\nexcept KeyError:\n    pass\n"
             "assert list(lazy()) == [0, 1, 2]\nassert note('hi') == 'hi1'")
    result = sandbox.run(code, tests, ["Pair", "total", "same", "fail", "lazy", "note"])
    assert result.ok, result.reason


@contained
def test_the_judge_uses_its_own_helpers_where_the_candidate_has_others():
    tests, setup = "assert abs(helper(f(2))) == 2", "def helper(x): return x - 4"
    assert sandbox.run("def f(x): return 6", tests, ["f"], setup=setup).ok
    assert not sandbox.run("def f(x): return 1\ndef helper(x): return 2", tests, ["f"], setup=setup).ok


@contained
def test_many_programs_keep_their_order():
    jobs = [{"code": f"def f(x): return {i} * x + 1", "tests": TESTS, "names": ["f"]} for i in range(4)]
    assert [result.ok for result in sandbox.run_many(jobs, workers=2)] == [False, False, True, False]


@contained
def test_a_set_of_words_has_the_same_order_each_time():
    code = "def f(): return list({'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'})\nprint(f())"
    assert sandbox.run(code).output == sandbox.run(code).output != ""


# ---- refusal ---------------------------------------------------------------------------------------------------------------------------------

def test_where_nothing_contains_it_refuses_with_the_reason(monkeypatch, outside):
    monkeypatch.setattr(sandbox, "_probe", lambda: (False, "no such kernel"))
    monkeypatch.delenv(sandbox.UNSAFE, raising=False)
    with pytest.raises(HildaError, match=f"no such kernel.*{sandbox.UNSAFE}=1"):
        sandbox.run("print(1)")
    assert sandbox.available() == (False, "no such kernel")


@pytest.mark.parametrize("allowed, variable", [(True, None), (False, "1")])
def test_told_explicitly_it_runs_uncontained(allowed, variable, monkeypatch, outside):
    monkeypatch.setattr(sandbox, "_probe", lambda: (False, "no such kernel"))
    monkeypatch.setenv(sandbox.UNSAFE, variable or "")
    assert sandbox.run("def f(x): return 2 * x + 1", TESTS, ["f"], allow_uncontained=allowed).ok
    assert not sandbox.run("def f(x): return 2 * x", TESTS, ["f"], allow_uncontained=allowed).ok


def test_leave_to_run_uncontained_does_not_weaken_a_sandbox_that_works(monkeypatch):
    monkeypatch.setattr(sandbox, "_probe", lambda: (True, ""))
    monkeypatch.setenv(sandbox.UNSAFE, "1")
    assert sandbox._check(allow_uncontained=True) is True


def test_a_process_that_could_not_be_contained_executes_nothing(monkeypatch, outside):
    monkeypatch.setattr(sandbox, "LAYERS", ())
    monkeypatch.setattr(sandbox, "_probe", lambda: (True, ""))
    with pytest.raises(HildaError, match="did not start"):
        sandbox.run(f"open({str(outside / 'new')!r}, 'w')")


def test_the_probe_reports_what_it_finds(monkeypatch):
    monkeypatch.setattr(sandbox, "LAYERS", ())
    assert sandbox._probe.__wrapped__()[0] is False
    monkeypatch.setattr(sandbox, "_execute", lambda *_, **__: sandbox.Result(False, "", "AssertionError: ['socket']", 0.1))
    assert sandbox._probe.__wrapped__() == (False, "the trial of the containment failed: AssertionError: ['socket']")


# ---- parts -----------------------------------------------------------------------------------------------------------------------------------

simple = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.complex_numbers(allow_nan=False)
values = st.recursive(simple, lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.integers() | st.tuples(st.text()), inner),
                      max_leaves=5)


@settings(max_examples=50, deadline=None)
@given(values)
def test_any_value_comes_back_from_its_message(value):
    data = json.loads(json.dumps(containment.encode(value, pytest.fail)))
    found = containment.decode(data, pytest.fail)
    assert found == value and repr(found) == repr(value)


def _simulate(program: bytes, architecture: int, number: int, second: int = 0) -> int:
    """What a seccomp program returns: an interpreter of the four instructions it uses."""
    packet, place, value = struct.pack("=iIQ6Q", number, architecture, 0, 0, second, 0, 0, 0, 0), 0, 0
    lines = list(struct.iter_unpack("HBBI", program))
    while True:
        operation, yes, no, constant = lines[place]
        place += 1
        if operation == 0x20:
            value = struct.unpack_from("=I", packet, constant)[0]
        elif operation == 0x15:
            place += yes if value == constant else no
        else:
            assert operation == 0x06
            return constant


@pytest.mark.parametrize("machine", containment.MACHINES)
def test_the_filter_lets_exactly_its_table_pass(machine):
    architecture, column = containment.MACHINES[machine]
    program = containment._filter(machine)
    allowed = {numbers[column] for numbers in containment.SYSCALLS.values()} - {-1}
    commands = {numbers[column]: found for numbers, found in containment.COMMANDS.items()}
    assert len(program) % 8 == 0 and len(program) // 8 <= 4096  # BPF_MAXINSNS
    for number in [*range(600), 0x40000000, 0x40000001, 0x7FFFFFFF, -1]:
        for second in (0, 3, 4, 8, 10, 0x5401, 0x5412, 0x5452, 1 << 32 | 0x5412):
            passes = number in allowed or (second & 0xFFFFFFFF) in commands.get(number, ())
            assert _simulate(program, architecture, number, second) == (0x7FFF0000 if passes else 0x00050001), (number, second)
    assert _simulate(program, 0x40000003, 0) == 0x80000000  # i386
    with pytest.raises(containment.Refused, match="riscv64"):
        containment._filter("riscv64")


@pytest.mark.parametrize("machine, header", [("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
                                             ("aarch64", "/usr/include/asm-generic/unistd.h")])
def test_system_call_numbers_are_those_of_the_kernel_headers(machine, header):
    if not Path(header).exists():
        pytest.skip(f"the kernel's header {header} is not installed")
    names = {"lseek": "3264_lseek", "mmap": "3264_mmap", "fstat": "3264_fstat", "newfstatat": "3264_fstatat", "ftruncate": "3264_ftruncate"}
    text, column = Path(header).read_text(encoding="utf-8"), containment.MACHINES[machine][1]
    known = {name.removeprefix("3264_"): int(number) for name, number in re.findall(r"#define __NR3?2?6?4?_(\w+)\s+(\d+)\b", text)}
    known |= {name: known[alias.removeprefix("3264_")] for name, alias in names.items() if alias.removeprefix("3264_") in known}
    for name, numbers in containment.SYSCALLS.items():
        assert known.get(name, -1) == numbers[column], name
    assert {(known["ioctl"], known["fcntl"])} == {tuple(numbers[column] for numbers in containment.COMMANDS)}


def test_the_inside_needs_nothing_but_the_standard_library():
    text = Path(containment.__file__).read_text(encoding="utf-8")
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.MULTILINE))
    assert imported <= set(sys.stdlib_module_names)
