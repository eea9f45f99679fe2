"""A script: `moebert compress` on a tiny BERT, undisturbed, and killed over and over and started again.

Every attempt is a fork of this process, which has imported everything: none waits for imports.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

from transformers import TrainerState

from moebert_kernels import cli
from moebert_kernels.cli_command import import_libraries
from moebert_kernels.compress.report.terminal import StageBars
from tests.compress.toys import make_data, make_teacher

BEGINNING = "beginning"
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Events:
    """What a run does that can be told apart from outside: steps of its stages, and changes to its files.

    Args:
        output: the folder whose changes count.
        deadly: the stage, and how many of its events happen; at the next one, or in a later stage, it dies.
    """

    def __init__(self, output, deadly=None):
        self.output = str(output)
        self.deadly = deadly
        self.counts = {BEGINNING: 0}

    @property
    def stage(self):
        return next(reversed(self.counts))

    def listen(self):
        tell = StageBars.__call__

        def told(bars, stage, done, total):
            self.counts.setdefault(stage, 0)
            if total:
                self.happen()
            tell(bars, stage, done, total)

        StageBars.__call__ = told
        sys.addaudithook(self.audit)

    def audit(self, name, arguments):
        if name == "open" and not arguments[2] & _WRITING:
            return
        if name in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            path = os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
            # Within a folder that is being removed names are relative.
            if path.startswith(self.output) or (
                path and name in ("os.remove", "os.rmdir") and path[0] != "/"
            ):
                self.happen()

    def happen(self):
        if self.deadly is not None and self.deadly[0] in self.counts:
            stage, survived = self.deadly
            if self.stage != stage or self.counts[stage] >= survived:
                os.kill(os.getpid(), signal.SIGKILL)
        self.counts[self.stage] += 1


def compress(folder, output):
    options = "--measure-length 8 --epochs 2 --batch-size 16 --max-length 16 --lr 1e-3 --compare narrow"
    sys.argv = ["moebert", "compress", "--teacher", str(folder / "teacher"), "--output", str(output)]
    sys.argv += ["--task", "csv", "--data", str(folder / "rows.csv"), "--validation-fraction", "0.4"]
    sys.argv += options.split()
    cli.main()


def start(folder, output, begin=lambda: None, *, end=lambda: None, log=True):
    """Run the command in a child; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        where = os.open(folder / "log" if log else os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(where, 1)
        os.dup2(where, 2)
        begin()
        compress(folder, output)
    except SystemExit as left:
        code = left.code or 0
        if code == 0:
            end()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def undisturbed(folder):
    """Make the run that all others must equal; return the events of its stages and the seconds it takes.

    What it imports as it goes is then imported here, too.
    """
    events = Events(folder / "undisturbed")
    found = folder / "events.json"
    before = time.monotonic()
    child = start(
        folder,
        folder / "undisturbed",
        events.listen,
        end=lambda: found.write_text(json.dumps([events.counts, sorted(sys.modules)])),
    )
    assert ended(child) == 0, (folder / "log").read_text()
    seconds = time.monotonic() - before
    counts, modules = json.loads(found.read_text())
    for name in modules:
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    gc.freeze()  # a child that collects garbage need not go through what it has inherited, and copy it
    return counts, seconds


def die_in_a_file_of_more_than(size):
    """The system ends the process in the middle of writing it, whichever library writes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def die_in_a_state():
    """In the middle of the file that makes a checkpoint complete."""

    def save_half(state, path):
        with open(path, "w") as file:
            file.write('{"global_step": 5, "log_hist')
        os.kill(os.getpid(), signal.SIGKILL)

    TrainerState.save_to_json = save_half


def main(folder, seed):
    drawn = random.Random(seed)
    make_teacher(folder / "teacher")
    data = make_data(n=80)
    rows = zip(data.train["text"], data.train["label"], strict=True)
    (folder / "rows.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    import_libraries()
    counts, seconds = undisturbed(folder)
    output = folder / "killed"
    deaths = []

    def die(where, expected=-signal.SIGKILL, **how):
        begun = time.monotonic()
        found = ended(start(folder, output, **how))
        assert found == expected, f"{where}: {found}\n{(folder / 'log').read_text()}"
        deaths.append([*where, round(time.monotonic() - begun, 2)])

    def die_writing(what, size):
        begin = functools.partial(die_in_a_file_of_more_than, size)
        die(("writing", what), -signal.SIGXFSZ, begin=begin, log=False)

    def die_in_time(stage, count):
        """At any moment; at the end of the stage at the latest, however fast this machine is."""
        wait = drawn.uniform(0, min(seconds / 6, 2))
        child = start(folder, output, Events(output, (stage, count)).listen)
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL, (folder / "log").read_text()
        deaths.append(["time", stage, round(wait, 2)])

    die_writing("importance", 400)
    for stage, count in counts.items():
        if stage in ("importance", "distill student", "distill narrow FFN"):
            die_in_time(stage, count - 3)
        # The last few may not come again: a run that goes on finds some folders made. In other stages it dies
        # at the beginning of the next, then.
        survived = drawn.randrange(count - 3)
        die((stage, survived), begin=Events(output, (stage, survived)).listen)
        if stage == "evaluate teacher":
            die_writing("a model", 20_000)
        if stage == "evaluate student before distillation":
            die_writing("an optimizer", 100_000)
            die(("writing", "a state"), begin=die_in_a_state)
    assert ended(start(folder, output)) == 0, (folder / "log").read_text()
    print(json.dumps({"events": counts, "deaths": deaths}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
