"""What leaving padding out is worth, whole encoders and distillation, as ratios of one run.

    python -m bench.packing --text SST-2/train.tsv --to bench/results/packing.json [--device cuda]

For BERT-base's and MiniLM's sizes, in every dtype the device computes in, rounds interleaved:

text       32 sentences padded to the longest, computed padded and packed, by ours and by the dense model
unpadded   as many tokens in 32 sentences of one length: what padding that costs nothing would leave
full       batches 1 x 32 and 8 x 128 with a mask of ones, which asks to be looked at
distil     a step of a DistillationTrainer on batches of 32 rows as they come: student, teacher, optimizer

Each ratio is the median over rounds of one time by another of the same round.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebert_kernels.compress.storage.artifacts import write_json
from moebert_kernels.environment import OtherWork, describe_environment
from moebert_kernels.models import Pack, packed, to_moe
from moebert_kernels.timing import interleave, timer_of

from .cases import DTYPES, SHAPES, ModelCase, cpu_dtypes
from .encoders import bert_sizes, build
from .text import BATCH, encode_sentences, pad, read_batch

_MOST_ROUNDS = 10_000
FULL = ((1, 32), (8, 128))
STEPS, BLOCK = 8, 4  # steps of each trainer that are timed, and at a time
_TITLES = {"bert-base": "BERT-base", "minilm": "MiniLM"}
Call = Callable[[], Any]


def interleaved(calls: dict[str, Call], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Seconds of each call in every round, after two calls that do not count."""
    for call in [*calls.values()] * 2:
        call()
    timers = {name: timer_of(device)(call) for name, call in calls.items()}
    return interleave(timers, rounds=_MOST_ROUNDS, max_seconds=seconds)


def ratio(found: dict[str, list[float]], slow: str, fast: str) -> dict[str, float]:
    """How many times as long `slow` takes as `fast`: the median over rounds, and the quartiles."""
    ratios = [a / b for a, b in zip(found[slow], found[fast], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high, "of_fastest": min(found[slow]) / min(found[fast])}


@torch.no_grad()
def forward(case: ModelCase, text: str, device: torch.device, seconds: float) -> dict[str, Any]:
    """The ratios of text and of full batches."""
    batch = read_batch(text, case.V)
    ids_BS, mask_BS = batch.ids_BS.to(device), batch.mask_BS.to(device)
    ours, dense = (build(case, kind).to(device, DTYPES[case.dtype]) for kind in ("experts", "dense"))
    num_real = int(mask_BS.sum())
    length = round(num_real / len(ids_BS))
    ids_1N = ids_BS[mask_BS != 0].repeat(2)[: len(ids_BS) * length]
    unpadded_BS = ids_1N.view(len(ids_BS), length)

    def how() -> dict[str, Any]:
        """By themselves, models pack a GPU's large batches alone."""
        return {} if device.type == "cpu" else {"pack": Pack.from_mask(mask_BS)}

    def dense_packed() -> None:
        with packed(dense):
            dense(ids_BS, mask_BS, **how())

    found = interleaved(
        {
            "padded": lambda: ours(ids_BS, mask_BS, pack=False),
            "packed": lambda: ours(ids_BS, mask_BS, **how()),
            "unpadded": lambda: ours(unpadded_BS),
            "dense padded": lambda: dense(ids_BS, mask_BS),
            "dense packed": dense_packed,
        },
        device,
        seconds,
    )
    per_token = num_real / unpadded_BS.numel()
    found["unpadded"] = [s * per_token for s in found["unpadded"]]
    ratios = {
        "padded / packed": ratio(found, "padded", "packed"),
        "packed / unpadded": ratio(found, "packed", "unpadded"),
        "dense padded / packed": ratio(found, "dense padded", "packed"),
        "dense packed / packed": ratio(found, "dense packed", "packed"),
    }
    for rows, columns in FULL:
        full_BS = ids_BS[mask_BS != 0].repeat(2 * rows * columns // num_real + 1)[: rows * columns]
        full_BS = full_BS.view(rows, columns)
        ones_BS = torch.ones_like(full_BS)
        ratios[f"full {rows}x{columns}"] = full(ours, full_BS, ones_BS, seconds)
    return {
        "padding": 1 - num_real / mask_BS.numel(),
        "shape": list(mask_BS.shape),
        "ratios": ratios,
        "ms": {name: 1e3 * statistics.median(s) for name, s in found.items()},
    }


def full(ours: Any, ids_BS: Tensor, ones_BS: Tensor, seconds: float) -> dict[str, float]:
    """How long looking at the mask takes: with it, by the same without."""
    calls = {"mask": lambda: ours(ids_BS, ones_BS), "padded": lambda: ours(ids_BS, ones_BS, pack=False)}
    return ratio(interleaved(calls, ids_BS.device, seconds), "mask", "padded")


def distil(case: ModelCase, text: str, device: torch.device) -> dict[str, float]:
    """How many times as many rows a second a `DistillationTrainer` takes with packing."""
    rows = encode_sentences(text, case.V)
    teacher = _teacher(case)
    neurons = torch.arange(case.E * case.F).view(case.E, case.F).expand(case.L, case.E, case.F)
    student = to_moe(teacher, neurons, num_shared_neurons=0)
    found: dict[str, list[float]] = {"padded": [], "packed": []}
    for number in range(STEPS // BLOCK):
        begin = number * BATCH * BLOCK % len(rows)
        part = rows[begin:] + rows[:begin]
        for name in list(found)[:: 1 if number % 2 else -1]:
            found[name] += _steps(student, teacher, part, case.dtype, device, pack=name == "packed")
    return ratio(found, "padded", "packed")


def _teacher(case: ModelCase) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**bert_sizes(case, case.E * case.F)))


def _steps(
    student: Any, teacher: Any, rows: list[list[int]], dtype: str, device: torch.device, *, pack: bool
) -> list[float]:
    """Seconds of `BLOCK` steps, after one that does not count."""
    from transformers import PrinterCallback, TrainerCallback, TrainingArguments

    from moebert_kernels.compress.training.trainer import DistillationTrainer

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            wait()
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            wait()
            seconds.append(time.perf_counter() - self.start)

    def collate(numbers: list[int]) -> dict[str, Tensor]:
        batch = pad([rows[number % len(rows)] for number in numbers])
        labels = torch.tensor([number % 2 for number in numbers])
        return {"input_ids": batch[0], "attention_mask": batch[1], "labels": labels}

    seconds: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench-packing-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=BLOCK + 1,
            per_device_train_batch_size=BATCH,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            bf16=dtype == "bfloat16",
            logging_steps=BLOCK + 1,
        )
        trainer = DistillationTrainer(
            copy.deepcopy(student),
            teacher,
            args=arguments,
            pack=pack,
            train_dataset=list(range(BATCH * (BLOCK + 1))),
            data_collator=collate,
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return seconds[1:]


def table(found: dict[str, Any]) -> str:
    """What was found, for a README."""
    columns = {
        "padded / packed": "padded / packed",
        "packed / unpadded": "packed / no padding",
        "dense padded / packed": "dense, padded / ours",
        "dense packed / packed": "dense, packed / ours",
        **{f"full {b}x{s}": f"full {b}×{s}, mask / none" for b, s in FULL},
        "distil": "distillation, padded / packed",
    }
    lines = [f"| | {' | '.join(columns.values())} |", "|---|" + "--:|" * len(columns)]
    for run in found["runs"]:
        cells = [run["ratios"].get(column) for column in columns]
        texts = ["" if cell is None else f"{cell['median']:.2f}" for cell in cells]
        lines.append(f"| {_TITLES[run['model']]}, {run['dtype']} | {' | '.join(texts)} |")
    first, environment = found["runs"][0], found["environment"]
    busy, machine = found["busy_cpus"], found.get("device", "cpu")
    if machine == "cpu":
        machine = f"{environment['cpu']}, {environment['threads']} threads"
    lines += [
        "",
        f"*`python -m bench.packing`: {first['shape'][0]} sentences of {found['text']}, "
        f"{first['padding']:.0%} padding, medians of ratios; {machine}"
        + (f", other work kept {busy:.1f} processors busy" if busy > 0.25 else "")
        + f"; torch {environment['versions']['torch']}, commit {environment['commit']}.*",
    ]
    return "\n".join(lines)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    yield
    torch.set_num_threads(before)


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", required=True, help='sentences, or a .tsv with a column "sentence"')
    parser.add_argument("--shape", default="minilm,bert-base", help="with commas")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", help="with commas; those that the device computes in, unless told")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each forward comparison")
    parser.add_argument("--layers", type=int, help="fewer layers, to try it")
    parser.add_argument("--threads", type=int, help="as many as there are processors, unless told")
    parser.add_argument("--no-distil", action="store_true", help="leave distillation out")
    parser.add_argument("--to", type=Path, help="the json file to write")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtypes = ",".join(cpu_dtypes()) if device.type == "cpu" else "bfloat16"
    others, runs = OtherWork(), []
    with _threads(options.threads):
        for shape in options.shape.split(","):
            sizes: dict[str, Any] = {**SHAPES[shape], **({"L": options.layers} if options.layers else {})}
            for dtype in (options.dtype or dtypes).split(","):
                case = ModelCase(T=0, **sizes, dtype=dtype)
                run = {"model": shape, "dtype": dtype, **forward(case, options.text, device, options.seconds)}
                print(json.dumps(run), flush=True)
                if not options.no_distil:
                    run["ratios"]["distil"] = distil(case, options.text, device)
                    print("distil", json.dumps(run["ratios"]["distil"]), flush=True)
                runs.append(run)
        found = {
            "environment": asdict(describe_environment()),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "busy_cpus": others.busy_cpus() or 0.0,
            "text": Path(options.text).name,
            "runs": runs,
        }
    if options.to is not None:
        write_json(options.to, found)
    print(table(found))


if __name__ == "__main__":
    main()
