"""A trainer as a command: reads the mined data, learns from it, leaves a model directory.

Usage: trainer_script.py DATA MODEL OUT [EXIT_CODE]
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np

from tests.training.mining import hand
from training.data.mixture import by_dataset
from training.data.sources import open_source


def main(data: str, model: str, out: str, code: str = "0") -> None:
    target = Path(out) / "export"
    mixture = by_dataset(open_source(data))
    examples = [mixture[i] for i in range(len(mixture))]
    if int(code):
        sys.exit(int(code))
    if (Path(model) / "w.npy").exists():
        rows = [
            (
                hand.letter_counts(e.query.content.text),
                hand.letter_counts(e.positives[0].content.text),
                np.stack([hand.letter_counts(d.content.text) for d in e.negatives]),
            )
            for e in examples
        ]
        hand.train(rows, Path(model), target, steps=2)
    else:
        shutil.copytree(model, target, dirs_exist_ok=True)
    seen = {e.key: [d.key for d in e.negatives] for e in examples}
    (Path(out) / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
