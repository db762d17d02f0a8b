"""Text: rows to tasks of token ids, the cache of tokens, and a clear line for every fault."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.tiny_tokenizer import SPECIAL, WORDS, save_tokenizer, write_texts

from metaplug.contract.task_sizes import IGNORED
from metaplug.errors import RequestError
from metaplug.experiments.build import build, build_tasks
from metaplug.experiments.configuration import ExperimentConfig, ModelSettings, TaskSettings
from metaplug.report.episodes import texts_figure
from metaplug.tasks import Text
from metaplug.tasks.identities import identities_of
from metaplug.tasks.text.table import TextConfig, read_texts
from metaplug.tasks.text.tokens import tokenize

SIZES = {"ways": 2, "shots": 1, "queries": 2}
FORM = '{"train": [names], "val": [names], "test": [names]}'
CLINC = Path(__file__).parents[3] / "shared" / "data" / "clinc150" / "utterances.csv"


def message_of(make: Callable[[], object]) -> str:
    with pytest.raises(RequestError) as error:
        make()
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table and a tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    save_tokenizer(folder / "tokenizer")
    write_texts(folder / "texts.csv")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("METAPLUG_CACHE", str(folder))
    return folder


def text(home: Path, **given: Any) -> Text:
    given = {**SIZES, "tokenizer": str(home / "tokenizer"), **given}
    return Text(home / "texts.csv", **given)


def words(ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
    """The known words of a text; the class's own is none of them."""
    known = dict(enumerate(WORDS, 4))
    return [known[token] for token in ids[mask == 1].tolist() if token in known]


# Tasks


def test_the_form_of_the_tasks(home: Path) -> None:
    source = text(home)
    batch = source.train.batch(0, range(5))
    assert set(batch.support_x) == set(batch.query_x) == {"input_ids", "attention_mask"}
    (support, mask), query = batch.support_x.values(), batch.query_x["input_ids"]
    assert support.dtype == mask.dtype == batch.support_y.dtype == torch.int64
    assert (support.shape[:2], query.shape[:2]) == ((5, 2), (5, 4))
    lengths = torch.cat([x["attention_mask"].sum(-1) for x in (batch.support_x, batch.query_x)], 1)
    assert support.shape[2] == query.shape[2] == int(lengths.max())
    assert (support[mask == 0] == SPECIAL["pad"]).all()
    assert (support[..., 0] == SPECIAL["cls"]).all()
    last = support.gather(2, mask.sum(-1, keepdim=True) - 1)
    assert (last == SPECIAL["sep"]).all()
    assert (source.kind, source.input_shape, source.outputs) == ("classification", (64,), 2)


def test_ids_are_those_of_the_texts(home: Path) -> None:
    source = text(home)
    batch, shown = source.val.batch(7, [3]), source.val.texts(7, 3)
    for part, x, y in (
        (shown.support, batch.support_x, batch.support_y),
        (shown.query, batch.query_x, batch.query_y),
    ):
        given = [one for texts in part for one in texts]
        rows = zip(x["input_ids"][0], x["attention_mask"][0], strict=True)
        assert [words(*row) for row in rows] == [one.split()[1:] for one in given]
        assert y[0].tolist() == [label for label, own in enumerate(part) for _ in own]
    for name, texts in zip(shown.names, shown.support, strict=True):
        assert texts[0].split()[0] == f"class{int(name[-2:])}"
    assert set(shown.names) <= set(source.val.classes.names)


@given(
    st.integers(0, 2**40),
    st.lists(st.integers(0, 10**6), min_size=1, max_size=5),
    st.sampled_from([{}, {"train_ways": (2, 3)}, {"train_shots": (1, 3), "vary": "task"}]),
)
def test_a_task_equals_itself_in_any_batch_but_for_its_padding(
    home: Path, seed: int, indices: list[int], options: dict[str, Any]
) -> None:
    tasks = text(home, seed=seed, fractions=(0.5, 0.25, 0.25), **options).train
    batch = tasks.batch(2, indices)
    for place, index in enumerate(indices):
        own = tasks.batch(2, [index])
        for part in ("support", "query"):
            x, y = (getattr(own, f"{part}_{field}") for field in "xy")
            whole_x, whole_y = (
                getattr(batch, f"{part}_{field}")[place : place + 1]
                if field == "y"
                else {
                    key: value[place : place + 1]
                    for key, value in getattr(batch, f"{part}_x").items()
                }
                for field in "xy"
            )
            count, length = y.shape[1], x["input_ids"].shape[2]
            assert torch.equal(whole_y[:, :count], y)
            assert (whole_y[:, count:] == IGNORED).all()
            for name, fill in (("input_ids", SPECIAL["pad"]), ("attention_mask", 0)):
                assert torch.equal(whole_x[name][:, :count, :length], x[name])
                assert (whole_x[name][:, :count, length:] == fill).all()
                assert (whole_x[name][:, count:] == 0).all()
        if batch.sizes is not None and own.sizes is not None:
            assert batch.sizes[place] == own.sizes[0]


def test_long_texts_are_cut_before_their_last_token_and_counted(home: Path) -> None:
    source = text(home, max_length=5)
    batch = source.train.batch(0, range(20))
    ids, mask = batch.support_x.values()
    assert ids.shape[2] == 5
    assert (ids.gather(2, mask.sum(-1, keepdim=True) - 1) == SPECIAL["sep"]).all()
    # Texts of a class have 1 to 6 words after their first, and two special tokens.
    assert source.describe()["tokens"] == {"mean": 4.83, "max": 5, "cut_texts": 48}


def test_the_description(home: Path) -> None:
    assert text(home).describe() == {
        "kind": "classification",
        "input_shape": [64],
        "outputs": 2,
        "origin": str(home / "texts.csv"),
        "licence": "not stated",
        "splits": {
            "train": {"classes": 8, "texts": 48},
            "val": {"classes": 2, "texts": 12},
            "test": {"classes": 2, "texts": 12},
        },
        "columns": {"text": "text", "label": "intent", "group": "domain"},
        "tokenizer": str(home / "tokenizer"),
        "vocabulary": 4 + len(WORDS),
        "tokens": {"mean": 6.5, "max": 9, "cut_texts": 0},
    }


def test_a_moved_stream_makes_the_same_tasks_there(home: Path) -> None:
    source = text(home)
    one, other = source.to("cpu").train.batch(0, [0, 1]), source.train.batch(0, [0, 1])
    assert all(map(torch.equal, one.tensors(), other.tensors()))
    batch = source.to("meta").train.batch(0, [0, 1])
    assert {each.device.type for each in batch.tensors()} == {"meta"}
    assert source.train.classes.ids.device.type == "cpu"


def test_identities_are_those_of_the_texts_whatever_the_tokens(home: Path) -> None:
    one, other = text(home).train, text(home, max_length=6).train
    assert identities_of(one) == identities_of(other) == one.identities
    assert len(set(one.identities.values())) == 8


def test_json_lines_and_parquet_give_the_same_tasks_as_csv(home: Path) -> None:
    table = read_texts(home / "texts.csv", TextConfig())
    rows = [
        {"text": table.texts[place], "intent": name, "domain": table.groups[name]}
        for name, own in table.classes.items()
        for place in own
    ]
    (home / "t.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), home / "t.parquet")
    for name in ("t.jsonl", "t.parquet"):
        assert read_texts(home / name, TextConfig()) == table


# Splits


@pytest.mark.parametrize(
    ("splits", "train"),
    [
        ({"train": ["group 1"], "val": ["group 0"], "test": ["group 2"]}, range(4, 8)),
        (
            {"train": ["class 00", "class 03"], "val": ["group 1"], "test": ["group 2"]},
            (0, 3),
        ),
    ],
)
def test_a_file_splits_by_labels_or_by_groups(
    home: Path, tmp_path: Path, splits: dict[str, list[str]], train: Any
) -> None:
    (tmp_path / "s.json").write_text(json.dumps(splits))
    source = text(home, splits=str(tmp_path / "s.json"))
    assert source.train.classes.names == tuple(f"class {label:02}" for label in train)


def test_splits_beside_the_file_and_in_a_column(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    write_texts(tmp_path / "texts.csv")
    names = [f"class {label:02}" for label in range(12)]
    splits = {"train": names[:5], "val": names[5:8], "test": names[8:]}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    assert list(text(tmp_path).train.classes.names) == splits["train"]
    lines = (tmp_path / "texts.csv").read_text().splitlines()
    parts = ["part", *[("test", "val", "train")[min(row // 18, 2)] for row in range(72)]]
    (tmp_path / "texts.csv").write_text(
        "\n".join(f"{line},{part}" for line, part in zip(lines, parts, strict=True))
    )
    by_column = text(tmp_path, split_column="part")
    assert list(by_column.test.classes.names) == names[:3]


@pytest.mark.parametrize(
    ("splits", "fault"),
    [
        ({"train": ["a"], "val": ["b"]}, "the splits {} do not name 'test': write FORM"),
        (
            {"train": ["klass 00"], "val": ["class 02"], "test": ["class 03"]},
            "the splits {}, train: unknown class 'klass 00': did you mean 'class 00'?",
        ),
        (
            {"train": ["group 0"], "val": ["group 1"], "test": ["class 01"]},
            "the splits {}: the class 'class 01' stands in the train and in the test split, so it "
            "would not be new to the model: keep it in one",
        ),
    ],
)
def test_splits_that_do_not_fit_are_refused(
    home: Path, tmp_path: Path, splits: dict[str, list[str]], fault: str
) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(splits))
    fault = fault.format(path).replace("FORM", FORM)
    assert message_of(lambda: text(home, splits=str(path))) == fault


def test_classes_with_the_same_texts_in_two_splits_are_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    rows = [f"{word} one,{word}" for word in ("red", "blue", "old", "new", "big", "two")]
    rows += [f"{word} two,{word}" for word in ("red", "blue", "old", "new", "big", "two")]
    rows += ["red two,copy", "red one,copy", "small,three", "one,three", "red one,four", "two,four"]
    (tmp_path / "texts.csv").write_text("\n".join(["text,label", *rows]))
    splits = {"train": ["red", "blue", "old"], "val": ["copy", "new"], "test": ["three", "four"]}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    assert message_of(lambda: text(tmp_path, queries=1)) == (
        "the class 'red' of the train split and the class 'copy' of the val split have the same "
        "texts, so they would not be new to the model: leave one of them out"
    )
    splits["val"] = ["big", "new"]  # the text that 'four' shares with 'red' is fine
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    assert text(tmp_path, queries=1).outputs == 2


# Tables


def table_of(path: Path, **settings: Any) -> Callable[[], object]:
    return lambda: read_texts(path, TextConfig(**settings))


@pytest.mark.parametrize(
    ("content", "settings", "fault"),
    [
        (
            "text,intent\na,b\n",
            {"label": "intend"},
            "the table {} has no column 'intend', which the setting label names: set label to one "
            "of its columns, which are 'text', 'intent'",
        ),
        (
            "utterance,label\na,b\n",
            {},
            "the table {} has no column 'text', which the setting text names: set text to one of "
            "its columns, which are 'utterance', 'label'",
        ),
        (
            "text;what\na;b\n",
            {"separator": "semicolon"},
            "the table {} has no column 'label', 'intent', 'class', 'category' for the labels: set "
            "label to one of its columns, which are 'text', 'what'",
        ),
        (
            "text,text,label\na,b,c\n",
            {},
            "the table {} has 2 columns 'text': give each a name of its own",
        ),
        (
            "text,label\na,b\n ,c\n",
            {},
            "the table {}, row 3, column 'text' has no text: write one, or leave the row out",
        ),
        (
            "text,label\na,\n",
            {},
            "the table {}, row 2, column 'label' names no label: name one, or leave the row out",
        ),
        (
            "text,label\na,b\x07\n",
            {},
            "the table {}, row 2, column 'label': 'b?' is no name of a label, as it is neither "
            "text nor a whole number, has more than 200 characters, a line break or the like: "
            "rename it",
        ),
        ("text,label\n", {}, "the table {} has a header but no rows: give it some"),
        (
            "text,label,part\na,b,train\nc,b,test\n",
            {"split_column": "part"},
            "the table {}, row 3: the class 'b' stands in the train and in the test split, so it "
            "would not be new to the model: keep it in one",
        ),
        (
            "text,label,part\na,b,dev\n",
            {"split_column": "part"},
            "the table {}, row 2, column 'part': unknown split 'dev': known: 'train', 'val', "
            "'test'",
        ),
        (
            "text,label,kind\na,b,x\nc,b,y\n",
            {"group": "kind"},
            "the table {}, row 3: the class 'b' stands in the groups 'x' and 'y': give it one, or "
            "set group to another column",
        ),
        (
            "text,label,intent\na,b,c\n",
            {},
            "the table {} has the columns 'label', 'intent', any of which may be that of the "
            "labels: set label to one of them",
        ),
        (
            "text,label,domain,group\na,b,c,d\n",
            {},
            "the table {} has the columns 'group', 'domain', any of which may be that of the "
            "groups: set group to one of them",
        ),
        (
            "text,label\na,b\nc,b \n",
            {},
            "the table {}, row 3: the class 'b ' looks as 'b' does, and would be another one: "
            "write both alike",
        ),
        (
            "text,label\na,\u00e9\nc,e\u0301\n",
            {},
            "the table {}, row 3: the class 'e\\u0301' looks as '\\xe9' does, and would be another "
            "one: write both alike",
        ),
        (
            'text,label\n"a,b\nc,d\n"e,f\n',
            {},
            "the table {}, line 4: text follows a closing quote, so a quote before it may stand "
            "for itself, and rows may be lost: double every quote within a cell, and quote that "
            "cell",
        ),
        (
            b"text,label\ncaf\xe9,b\n",
            {},
            "the table {} is no readable CSV file in UTF-8 (In CSV column #0: Row #2: CSV "
            "conversion error to string: invalid UTF8 data): correct it there",
        ),
    ],
)
def test_faults_of_a_table(
    tmp_path: Path, content: str | bytes, settings: dict[str, str], fault: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert message_of(table_of(path, **settings)) == fault.format(path)


def test_a_line_break_and_a_quote_may_stand_in_a_quoted_cell(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('text,label,intent\n"two\nlines","a ""b""",x\nanother,c,y\n')
    table = read_texts(path, TextConfig(label="label"))
    assert table.texts == ["two\nlines", "another"]
    assert table.classes == {'a "b"': [0], "c": [1]}


def test_a_column_with_a_role_is_not_taken_for_the_labels(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("text,intent,category\na,b,c\n")
    assert read_texts(path, TextConfig(group="category")).columns == {
        "text": "text",
        "label": "intent",
        "group": "category",
    }


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"\n", "the table {} has no row: give it some, one JSON object a line"),
        (
            b'{"text": "a", "label": "b"}\n[1]\n',
            "the table {}, line 2 is no JSON object in UTF-8 (it is of type list): write one "
            'object a line, such as {{"text": "...", "label": "..."}}',
        ),
        (
            b'{"text": "a", "label": NaN}\n',
            "the table {}, line 1 is no JSON object in UTF-8 (NaN is no number in JSON): write one "
            'object a line, such as {{"text": "...", "label": "..."}}',
        ),
        (
            b'{"text": "a", "text": "b", "label": "c"}\n',
            "the table {}, line 1 is no JSON object in UTF-8 (the key 'text' stands twice): write "
            'one object a line, such as {{"text": "...", "label": "..."}}',
        ),
        (
            b'{"text": "a", "label": "b"}\n{"text": "a"}\n',
            "the table {}, row 2, column 'label' names no label: name one, or leave the row out",
        ),
        (
            b'{"text": 5, "label": "b"}\n',
            "the table {}, row 1, column 'text' is no text: write one, or leave the row out",
        ),
        (
            b'{"text": "a\\ud800", "label": "b"}\n',
            "the table {}, row 1, column 'text' has half of a letter, which UTF-8 cannot write: "
            "'a?'; correct it",
        ),
    ],
)
def test_faults_of_json_lines(tmp_path: Path, content: bytes, fault: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    assert message_of(table_of(path)) == fault.format(path)


def test_missing_files_and_settings(tmp_path: Path) -> None:
    path = tmp_path / "none.csv"
    assert message_of(lambda: Text(path)) == (
        f"the table {path}: there is no such file; give the path of a CSV, JSON lines or Parquet "
        "file"
    )
    assert message_of(lambda: Text(path, splits="a", split_column="b")) == (
        "text: splits and split_column both split the classes: give one of them"
    )
    assert message_of(lambda: Text(path, text="a", label="a")) == (
        "text: the column 'a' is named twice: name it once"
    )
    write_texts(path)
    assert message_of(lambda: Text(path)) == (
        "text has no tokenizer: set tokenizer to a folder that has a tokenizer.json, or to a name "
        "on the hub of Hugging Face; a model transformers:NAME brings its own"
    )
    path.write_text("text,label\na,b\n")
    assert message_of(lambda: Text(path)) == (
        f"the val split has none of the 1 classes of the table {path}: give it some, by splits, by "
        "split_column or by a larger share in fractions"
    )


def test_a_class_of_too_few_texts_is_refused(home: Path) -> None:
    fault = (
        "2 shots and 5 queries need 7 texts of every class, but the class 'class 00' of the train "
        "split has 6: lower shots or queries, or leave that class out"
    )
    assert message_of(lambda: text(home, shots=2, queries=5)) == fault


# Tokens


def test_tokens_are_made_once_and_anew_where_anything_is_wrong_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("METAPLUG_CACHE", str(tmp_path / "cache"))
    folder = save_tokenizer(tmp_path / "tokenizer")
    caplog.set_level(logging.INFO)

    def tokens(
        texts: tuple[str, ...] = ("red big", "blue"), max_length: int = 8
    ) -> list[list[int]]:
        made = tokenize(texts, str(folder), max_length, download=False)
        assert (made.pad, made.vocabulary) == (3, 14)
        return [made.ids.tolist(), made.lengths.tolist(), made.cut.tolist()]

    def files() -> list[Path]:
        return sorted((tmp_path / "cache" / "tokens").iterdir())

    first = tokens()
    assert first == [[1, 4, 7, 2, 1, 6, 2], [4, 3], [False, False]]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)  # not even imported the second time
        assert tokens() == first
    (path,) = files()
    whole = path.read_bytes()
    for broken in (whole[:-3], whole[:-1] + b"\x09", b""):
        path.write_bytes(broken)
        assert tokens() == first
        assert path.read_bytes() == whole
    assert "the cached tokens in" in caplog.text
    tokens(max_length=4)
    tokens(("red big", "green"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 99}))
    tokens()
    assert len(files()) == 4


def test_faults_of_a_tokenizer(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(tokenizer: object, **given: Any) -> str:
        return message_of(lambda: text(home, tokenizer=str(tokenizer), **given))

    assert fault("./none") == (
        "the tokenizer ./none: there is no such folder; give one that has a tokenizer.json, such "
        "as the model's, or its name on the hub of Hugging Face"
    )
    (tmp_path / "empty").mkdir()
    assert fault(tmp_path / "empty") == (
        f"the tokenizer folder {tmp_path / 'empty'} has no tokenizer.json, nor a vocabulary of "
        "another name: put the tokenizer's files there, by its save_pretrained"
    )
    from huggingface_hub import constants

    assert fault("nobody/nothing-of-this-name") == (
        "the tokenizer 'nobody/nothing-of-this-name' is no folder here, and not in the cache of "
        f"Hugging Face ({constants.HF_HUB_CACHE}): put its tokenizer.json and "
        "tokenizer_config.json in a folder and name that, or set download: true"
    )
    short = save_tokenizer(tmp_path / "short", most=16)
    assert fault(short) == (
        f"max_length = 64, but the tokenizer in {short} is for at most 16 tokens: lower max_length"
    )
    (short / "tokenizer.json").write_text("{")
    assert fault(short, max_length=8).startswith(f"the tokenizer in {short} does not load (")
    with monkeypatch.context() as patch:
        patch.setenv("METAPLUG_CACHE", str(tmp_path / "cache"))
        patch.setitem(sys.modules, "transformers", None)
        assert fault(home / "tokenizer") == (
            "the task source 'text' needs transformers: pip install 'metaplug[text]'"
        )


# Experiments and pictures


def config(home: Path, model: str, **settings: Any) -> ExperimentConfig:
    return ExperimentConfig(
        tasks=TaskSettings(source=f"text:{home / 'texts.csv'}", **SIZES, settings=settings),
        model=ModelSettings(name=model),
    )


def test_a_transformers_model_brings_its_tokenizer(home: Path) -> None:
    folder = home / "tokenizer"
    made = build_tasks(config(home, f"transformers:{folder}"))
    assert made.describe()["tokenizer"] == str(folder)
    own = build_tasks(config(home, "transformers:another", tokenizer=str(folder)))
    assert own.describe()["tokenizer"] == str(folder)


@pytest.mark.parametrize("model", ["conv4", "mlp", "torchvision:resnet18"])
def test_a_model_of_one_tensor_is_refused(home: Path, model: str) -> None:
    given = config(home, model, tokenizer=str(home / "tokenizer"))
    assert message_of(lambda: build(given)) == (
        f"the model '{model}' takes one tensor, but the tasks have 'input_ids', 'attention_mask': "
        "choose transformers:NAME_OR_FOLDER, or a model of your own that takes these by name"
    )


def test_a_task_is_written_out(home: Path, tmp_path: Path) -> None:
    task = text(home, queries=5).train.texts(0, 0)
    task.support[0][0] = "$x^2 \u6f22\n" * 50  # no mathematics, a letter that the font has not
    texts_figure(task, tmp_path / "task.png", "one $task")
    with Image.open(tmp_path / "task.png") as picture:
        assert (picture.format, picture.width) == ("PNG", 1200)


@pytest.mark.skipif(not CLINC.is_file(), reason="clinc150 is not in shared/data beside the project")
def test_real_intents_are_split_by_domain() -> None:
    table = read_texts(CLINC, TextConfig())
    assert (len(table.texts), len(table.classes)) == (22_500, 150)
    assert table.groups is not None
    assert len(set(table.groups.values())) == 10
