"""lm-eval's own task definitions, read without its task manager, and our documents in their place.

The manager would fetch a task's data from the hub when it loads the task; here only the YAML file
is read.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memdlm.data.tokenizer import check_encodable
from memdlm.errors import DataError, UsageError
from memdlm.evaluation.tasks.task import TaskRequest, with_harness

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_definition(folder: str, name: str) -> dict[str, Any]:
    """Return the config in lm-eval's `tasks/<folder>/<name>.yaml`, files it includes merged in.

    `!function module.name` becomes the function of that module of lm-eval.

    Raises:
        UsageError: lm-eval is not installed, too old to have the task, or lacks a package that
            the task's functions need.
    """
    with_harness()
    import lm_eval.tasks
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def function(_loader: Any, node: yaml.ScalarNode) -> Any:
        module, _, attribute = str(node.value).rpartition(".")
        with warnings.catch_warnings():
            # What the metrics' packages say when imported (deprecations, speed) is for lm-eval.
            warnings.simplefilter("ignore")
            return getattr(import_module(f"lm_eval.tasks.{folder}.{module}"), attribute)

    Loader.add_constructor("!function", function)
    path = Path(lm_eval.tasks.__file__).parent / folder / name
    try:
        # A subclass of SafeLoader: it makes plain values and lm-eval's own functions, nothing else.
        config = yaml.load(path.with_name(f"{name}.yaml").read_text("utf-8"), Loader)
        include = config.pop("include", None)
        if include is None:
            return dict(config)
        base = yaml.load(path.with_name(include).read_text("utf-8"), Loader)
    except FileNotFoundError as error:
        raise UsageError(
            f"lm-eval has no {error.filename}: pip install --upgrade 'memdlm[eval]'"
        ) from error
    except ImportError as error:
        raise UsageError(
            f"lm-eval's {folder} tasks cannot be loaded ({error}): pip install 'memdlm[eval]'"
        ) from error
    return {**base, **config}


def with_documents(
    definition: Mapping[str, Any], name: str, documents: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return a definition of our name over our documents, its only split being `test`."""
    return {
        **{key: value for key, value in definition.items() if not key.startswith("dataset_")},
        "task": name,
        "test_split": "test",
        "custom_dataset": test_split(documents),
    }


def test_split(documents: Sequence[Mapping[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Return what lm-eval calls as `custom_dataset`: it gives the documents as the split `test`."""
    import datasets

    split = datasets.Dataset.from_list([dict(document) for document in documents])
    # lm-eval passes a task's metadata, which says nothing that the documents do not hold.
    return lambda **_: {"test": split}


def check_known(request: TaskRequest, texts: Iterable[str]) -> None:
    """Refuse texts that the model cannot read.

    Raises:
        DataError: The tokenizer does not know a word; it names the task and the words.
    """
    unknown = request.tokenizer.unk_token_id
    for text in texts:
        ids: Any = request.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if unknown is not None and unknown in ids:
            refuse_unknown(request.tokenizer, text, request.name)


def refuse_unknown(tokenizer: "PreTrainedTokenizerBase", text: str, where: str) -> None:
    """Raise for a text of which the tokenizer does not know a word.

    Raises:
        DataError: It names `where` and, if the tokenizer can tell, the words.
    """
    try:
        if not tokenizer.is_fast:  # such a one cannot say which words
            raise DataError("the tokenizer does not know all words of the task; use another")
        check_encodable(tokenizer, text)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
