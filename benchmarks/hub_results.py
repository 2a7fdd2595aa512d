"""The measured results in the form that the Hub shows beside a model: `.eval_results/*.yaml`.

    python -m benchmarks.hub_results --out models/ubmoe-135m/.eval_results
    hf upload OWNER/ubmoe-135m models/ubmoe-135m/.eval_results .eval_results

Only what mteb's own datasets were measured with on their test split: the Hub compares these with other models. The
`model-index` of the card holds the rest.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.embedding import SICK_TEST
from benchmarks.report import MODEL, MTEB_DATASETS, Results, of
from benchmarks.results import RESULTS, read_all

if TYPE_CHECKING:
    from huggingface_hub import EvalResultEntry


def entries(results: Results, row: str = MODEL) -> list[EvalResultEntry]:
    """The test results of one row on datasets of mteb, named as mteb names them on the Hub.

    Args:
        results: Of `benchmarks.results.read_all`.
        row: Of the tables.
    """
    from huggingface_hub import EvalResultEntry

    found = []
    for content in of(results, "embedding"):
        for score in content["scores"] if content["row"] == row else ():
            source = MTEB_DATASETS.get(score["task"])
            if source and score["split"] == "test" and score["task"] != SICK_TEST:
                found.append(
                    EvalResultEntry(
                        dataset_id=source,
                        task_id=f"{score['task']}_default_test",
                        value=round(score["value"], 2),
                        notes=f"{score['metric']} x100, from local copies of the dataset",
                    )
                )
    return found


def write(results: Results, folder: Path, row: str = MODEL) -> Path:
    """Write `mteb.yaml` into a folder.

    Raises:
        ValueError: If nothing was measured on a dataset of mteb.
    """
    import yaml
    from huggingface_hub import eval_result_entries_to_yaml

    found = entries(results, row)
    if not found:
        raise ValueError(f"{row} has no test result on a dataset of mteb; run `python -m benchmarks.embedding` first")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "mteb.yaml"
    file.write_text(yaml.safe_dump(eval_result_entries_to_yaml(found), sort_keys=False), encoding="utf-8")
    return file


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, .eval_results of a checkpoint")
    parser.add_argument("--row", default=MODEL, help="row of the tables")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    options = parser.parse_args(arguments)
    write(read_all(options.results), options.out, options.row)


if __name__ == "__main__":
    main()
