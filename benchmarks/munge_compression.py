"""Model compression (36): an ensemble of unlike models taught to a small network on pseudo data, on few digits.

The teacher is the mean of a forest, extra trees and a support vector machine, each fitted on the same few pictures as
the student has. All students take about as many steps, so that none gains by training longer. Test accuracy in percent,
five seeds, each with pictures of its own.
"""

from __future__ import annotations

import io
import pickle
import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier
from sklearn.svm import SVC

from _common import CACHE, Ledger, apart, by_name, claims_table, publish, shown, table, unseen
from _mlp import accuracy, mlp
from karui.data import Splits, load_data
from karui.data.splits import take
from karui.distill.munge import ModelCompression
from karui.technique import Bench
from karui.train import Adam, Cosine, Training

SEEDS, FEWER, STEPS, BATCH = 5, 3, 1000, 64
WIDTHS = (8, 128)


def drawn(splits: Splits, samples: int, seed: int) -> Splits:
    order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(seed))
    return replace(splits, train=take(splits.train, order[:samples]))


def library(splits: Splits, seed: int) -> tuple[Any, ...]:
    inputs, labels = splits.train.tensors
    x, y = inputs.flatten(1).double().numpy(), labels.numpy()
    return (
        RandomForestClassifier(100, random_state=seed).fit(x, y),
        ExtraTreesClassifier(100, random_state=seed).fit(x, y),
        CalibratedClassifierCV(SVC(C=10), ensemble=False).fit(x, y),
    )


def bench_for(splits: Splits, samples: int, seed: int) -> tuple[Bench, int]:
    """A bench, and the passes over so many samples that take the steps."""
    epochs = round(STEPS / -(-samples // BATCH))
    training = Training(epochs=epochs, batch_size=BATCH, optimizer=Adam(lr=1e-2), schedule=Cosine())
    bench = Bench(train=splits.train, validation=splits.validation, test=splits.test, training=training, seed=seed)
    return bench, epochs


def taught(splits: Splits, teacher: tuple[Any, ...], seed: int, width: int, settings: dict[str, Any]) -> float:
    step = ModelCompression(teacher=teacher, **settings)
    number = len(splits.train)
    pseudo = step.copies * number * (1 - step.held)
    bench, epochs = bench_for(splits, round(pseudo) + number * step.originals, seed)
    return accuracy(replace(step, epochs=epochs).apply(mlp(64, width, 10, seed=seed), bench), splits)


def arms(digits: Splits, samples: int, seed: int) -> dict[str, float]:
    """Every way of making the transfer set, for a student of 32 hidden units."""
    splits = drawn(digits, samples, seed)
    teacher = library(splits, seed)
    x, y = (part.numpy() for part in splits.test.tensors)
    votes = sum(one.predict_proba(x.reshape(len(x), -1).astype(np.float64)) for one in teacher)
    bench, _ = bench_for(splits, samples, seed)
    told = {
        "the ensemble": 100 * float((votes.argmax(1) == y).mean()),
        "hard labels": accuracy(bench.fit(mlp(64, 32, 10, seed=seed)), splits),
    }
    ways: dict[str, dict[str, Any]] = {
        "k = 0: the same pictures": {"copies": 0},
        **{f"MUNGE, k = {k}": {"copies": k} for k in (1, 3, 10)},
        "MUNGE alone, k = 10": {"copies": 10, "originals": False},
        "NBE alone, k = 10": {"copies": 10, "originals": False, "generator": "nbe"},
        "RANDOM alone, k = 10": {"copies": 10, "originals": False, "generator": "random"},
    }
    return told | {name: taught(splits, teacher, seed, 32, settings) for name, settings in ways.items()}


def widths(digits: Splits, seed: int) -> dict[str, float]:
    """Students of several sizes, taught by labels and by pseudo data."""
    splits = drawn(digits, 300, seed)
    teacher, told = library(splits, seed), {}
    for width in WIDTHS:
        bench, _ = bench_for(splits, 300, seed)
        told[f"{width} labels"] = accuracy(bench.fit(mlp(64, width, 10, seed=seed)), splits)
        told[f"{width} munge"] = taught(splits, teacher, seed, width, {"copies": 10})
    return told


def sizes(digits: Splits) -> dict[str, float]:
    """Bytes and CPU time of the ensemble and of the student, for all test pictures at once."""
    splits = drawn(digits, 300, 0)
    teacher, student = library(splits, 0), mlp(64, 32, 10, seed=0)
    x = splits.test.tensors[0]
    flat = x.flatten(1).double().numpy()
    held = io.BytesIO()
    pickle.dump(teacher, held)  # in memory: how much there is to keep
    net = student.module.eval()
    work = {"ensemble": lambda: [one.predict_proba(flat) for one in teacher], "student": lambda: net(x)}
    times: dict[str, list[float]] = {name: [] for name in work}
    with torch.no_grad():
        for _ in range(25):
            for name, run in work.items():
                began = time.process_time()
                run()
                times[name].append(time.process_time() - began)
    told = {f"{name} seconds": statistics.median(found[5:]) for name, found in times.items()}
    return told | {"ensemble bytes": len(held.getvalue()), "student bytes": len(save(net.state_dict()))}


def measured(values: dict[str, Any]) -> dict[str, list[str]]:
    """What `karui show` tells of it."""
    lines = []
    for samples in ("100", "300"):
        told = values["arms"][samples]
        lines.append(
            f"{samples} digits, 64-32-10: accuracy with hard labels {shown(told['hard labels'])}, MUNGE k = 10 "
            f"{shown(told['MUNGE, k = 10'])}, RANDOM alone {shown(told['RANDOM alone, k = 10'])}, the ensemble that "
            f"teaches {told['the ensemble']['mean']:.1f} %"
        )
    size = values["sizes"]
    lines.append(
        f"the student is {size['ensemble bytes'] / size['student bytes']:,.0f} times smaller than the ensemble and "
        f"{size['ensemble seconds'] / size['student seconds']:,.0f} times faster (597 digits at once, one core)"
    )
    return {"munge_compression": lines + unseen(values["claims"])}


def main() -> None:
    ledger, digits = Ledger(CACHE / "munge_compression.json"), load_data("digits")
    runs = {
        n: [ledger.once(f"{n} digits, seed {s}", lambda n=n, s=s: arms(digits, n, s)) for s in range(SEEDS)]
        for n in (300, 100)
    }
    scan = by_name([ledger.once(f"widths, seed {s}", lambda s=s: widths(digits, s)) for s in range(FEWER)])
    size = ledger.once("sizes", lambda: sizes(digits))
    gains = {
        str(samples): {
            "MUNGE, k = 10, over hard labels": apart(found, "MUNGE, k = 10", "hard labels"),
            "MUNGE, k = 10, over the same pictures": apart(found, "MUNGE, k = 10", "k = 0: the same pictures"),
            "MUNGE over RANDOM, each alone": apart(found, "MUNGE alone, k = 10", "RANDOM alone, k = 10"),
            "MUNGE over NBE, each alone": apart(found, "MUNGE alone, k = 10", "NBE alone, k = 10"),
            "k = 10 over k = 1": apart(found, "MUNGE, k = 10", "MUNGE, k = 1"),
        }
        for samples, found in runs.items()
    }
    many, few = gains["300"], gains["100"]
    labels, control = "MUNGE, k = 10, over hard labels", "MUNGE over RANDOM, each alone"
    smaller, faster = (size[f"ensemble {what}"] / size[f"student {what}"] for what in ("bytes", "seconds"))
    claims = {
        "300 digits: MUNGE is 1 point better than hard labels": many[labels]["mean"] >= 1,
        "100 digits: MUNGE is 1 point better than hard labels": few[labels]["mean"] >= 1,
        "300 digits: MUNGE alone is 3 points better than RANDOM alone": many[control]["mean"] >= 3,
        "100 digits: MUNGE alone is 3 points better than RANDOM alone": few[control]["mean"] >= 3,
        "MUNGE alone is better than NBE alone, at both sizes": all(
            told["MUNGE over NBE, each alone"]["mean"] > 0 for told in gains.values()
        ),
        "the error falls with k, from 1 to 10, at both sizes": all(
            told["k = 10 over k = 1"]["mean"] > 0 for told in gains.values()
        ),
        "the student is 100 times smaller and 10 times faster than the ensemble": smaller >= 100 and faster >= 10,
    }
    told = {str(samples): by_name(found) for samples, found in runs.items()}
    values = {"arms": told, "gains": gains, "widths": scan, "sizes": size, "claims": claims}
    rows = [[arm, shown(told["300"][arm]), shown(told["100"][arm])] for arm in told["300"]]
    scanned = [[str(width), shown(scan[f"{width} labels"]), shown(scan[f"{width} munge"])] for width in WIDTHS]
    text = f"""# Model compression with MUNGE (36)

Test accuracy in percent on the digits, mean and 95 % interval over {SEEDS} seeds; about {STEPS:,} steps for every
student. p = 0.2, s = 5. The student has 32 hidden units; the teacher is a forest, extra trees and a support vector
machine, fitted on the same pictures.

{table(["taught on", "300 digits", "100 digits"], rows)}

Differences in points, seed by seed:

{table(["difference", "300 digits", "100 digits"], [[a, shown(many[a]), shown(few[a])] for a in many])}

Other numbers of hidden units, 300 digits, {FEWER} seeds:

{table(["hidden units", "hard labels", "MUNGE, k = 10"], scanned)}

The ensemble holds {size["ensemble bytes"]:,} bytes and takes {1e3 * size["ensemble seconds"]:.1f} ms for 597 digits,
the student {size["student bytes"]:,} bytes and {1e3 * size["student seconds"]:.2f} ms.

{claims_table(claims)}
"""
    publish("munge_compression", values, text, measured(values))


if __name__ == "__main__":
    main()
