"""Tabular: rows to tasks, tasks to splits, and a clear line for every fault of a table."""

import csv
import json
from collections.abc import Callable
from itertools import chain, combinations
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metaplug.contract.task_batch import FIELDS
from metaplug.errors import RequestError
from metaplug.experiments.build import build_tasks
from metaplug.experiments.configuration import ExperimentConfig, TaskSettings
from metaplug.tasks import Tabular

SIZES = {"shots": 1, "queries": 1}
EVEN = {"fractions": (0.4, 0.3, 0.3)}
SPLITS = ("train", "val", "test")
FORM = '{"train": [names], "val": [names], "test": [names]}'


def write(path: Path, *rows: list[object], header: str = "task,x,target") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


def write_tasks(path: Path, tasks: str = "abcdefghij", rows: int = 4) -> Path:
    """A table whose x numbers the rows, and whose target is 100 times as much."""
    names = [name for _ in range(rows) for name in tasks]
    return write(path, *([name, place, 100 * place] for place, name in enumerate(names)))


def names(source: Tabular) -> list[list[str]]:
    return [list(stream.rows.names) for stream in (source.train, source.val, source.test)]


def message_of(make: Callable[[], object]) -> str:
    with pytest.raises(RequestError) as error:
        make()
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "table.csv")


# Tasks


def test_the_form_of_the_tasks(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.csv",
        *([name, i, 2 * i, 3, i, -i] for i in range(6) for name in "abcdef"),
        header="t,u,v,w,y,z",
    )
    source = Tabular(
        path,
        shots=2,
        queries=3,
        task="t",
        targets=["z", "y"],
        features=["v", "u"],
        **EVEN,
        standardise=False,
    )
    batch = source.train.batch(0, range(5))
    assert batch.support_x.shape == batch.support_y.shape == (5, 2, 2)
    assert batch.query_x.shape == batch.query_y.shape == (5, 3, 2)
    assert {getattr(batch, field).dtype for field in FIELDS} == {torch.float32}
    assert all(getattr(batch, field).is_contiguous() for field in FIELDS)
    # Columns stand in the order of the settings: v = 2 u, z = -u and y = u.
    assert torch.equal(batch.query_x[..., 0], 2 * batch.query_x[..., 1])
    assert torch.equal(
        batch.query_y, torch.stack([-batch.query_x[..., 1], batch.query_x[..., 1]], -1)
    )
    assert (source.kind, source.input_shape, source.outputs) == ("regression", (2,), 2)
    assert Tabular(path, task="t", targets=["z"], shots=1, queries=1).describe()["features"] == [
        "u",
        "v",
        "w",
        "y",
    ]


def test_the_description(table: Path) -> None:
    splits = {
        "train": {"tasks": 4, "rows": 16},
        "val": {"tasks": 3, "rows": 12},
        "test": {"tasks": 3, "rows": 12},
    }
    expected = {
        "kind": "regression",
        "input_shape": [1],
        "outputs": 1,
        "origin": str(table),
        "licence": "not stated",
        "features": ["x"],
        "targets": ["target"],
        "standardisation": None,
        "splits": splits,
    }
    assert Tabular(table, **SIZES, **EVEN, standardise=False).describe() == expected
    description = Tabular(table, **SIZES, **EVEN).describe()
    assert description | {"standardisation": None} == expected
    json.dumps(description)


def test_a_task_is_one_of_the_split_and_its_rows_are_distinct_and_all_occur(table: Path) -> None:
    source = Tabular(table, shots=1, queries=2, **EVEN, standardise=False)
    for stream in (source.train, source.val, source.test):
        batch = stream.batch(0, range(400))
        rows = torch.cat([batch.support_x, batch.query_x], 1).squeeze(-1).long()
        tasks = rows % 10
        assert torch.equal(tasks, tasks[:, :1].expand_as(tasks))
        assert {"abcdefghij"[task] for task in tasks[:, 0].tolist()} == set(stream.rows.names)
        assert all(len(set(row)) == 3 for row in rows.tolist())
        own = {place for place in range(40) if "abcdefghij"[place % 10] in stream.rows.names}
        assert (
            set(batch.support_x.flatten().long().tolist())
            == own
            == set(batch.query_x.flatten().long().tolist())
        )
        assert torch.equal(batch.query_y, 100 * batch.query_x)


def test_a_task_depends_on_seed_split_iteration_and_index_alone(table: Path) -> None:
    whole = Tabular(table, **SIZES, **EVEN).train.batch(2, range(20))
    assert torch.equal(
        Tabular(table, **SIZES, **EVEN).train.batch(2, [4, 9]).query_y, whole.query_y[[4, 9]]
    )
    assert not torch.equal(
        Tabular(table, **SIZES, **EVEN, seed=1).train.batch(2, range(20)).query_y, whole.query_y
    )
    assert not torch.equal(
        Tabular(table, **SIZES, **EVEN).train.batch(3, range(20)).query_y, whole.query_y
    )
    # The same rows under another split's name are drawn in another order.
    swapped = {"train": list("abc"), "val": list("def"), "test": list("ghij")}
    table.with_name("one.json").write_text(json.dumps(swapped))
    table.with_name("two.json").write_text(
        json.dumps({**swapped, "train": swapped["val"], "val": swapped["train"]})
    )
    one, two = (
        Tabular(table, **SIZES, splits=table.with_name(f"{name}.json"), standardise=False)
        for name in ("one", "two")
    )
    assert torch.equal(one.train.rows.values, two.val.rows.values)
    assert not torch.equal(
        one.train.batch(0, range(20)).query_x, two.val.batch(0, range(20)).query_x
    )


def test_the_order_of_tasks_in_the_file_does_not_matter(table: Path) -> None:
    header, *rows = table.read_text().splitlines()
    other = table.with_name("other.csv")
    # All rows of a task after each other, instead of one of each task in turn.
    other.write_text("\n".join([header, *sorted(rows, key=lambda row: row[0])]))
    one, two = (Tabular(path, **SIZES, **EVEN).train.batch(0, range(9)) for path in (table, other))
    assert torch.equal(one.query_x, two.query_x)


def test_the_command_line_finds_it(table: Path) -> None:
    settings = TaskSettings(
        source=f"tabular:{table}",
        shots=2,
        queries=1,
        settings={"targets": ["x"], "features": ["target"], **EVEN},
    )
    source = build_tasks(ExperimentConfig(tasks=settings))
    assert isinstance(source, Tabular)
    assert source.describe()["targets"] == ["x"]


# Splits


def test_fractions_split_by_name_whatever_the_seed(table: Path) -> None:
    source = Tabular(table, **SIZES, fractions=(0.6, 0.2, 0.2))
    assert [len(part) for part in names(source)] == [6, 2, 2]
    assert sorted(chain.from_iterable(names(source))) == list("abcdefghij")
    assert names(Tabular(table, **SIZES, fractions=(0.6, 0.2, 0.2), seed=5)) == names(source)


def test_a_file_splits_and_leaves_out_what_it_does_not_name(tmp_path: Path) -> None:
    path = write_tasks(tmp_path / "t.csv", "123456")
    splits = tmp_path / "splits.json"
    splits.write_text('{"test": ["5"], "train": [2, 1], "val": ["3"]}')
    assert names(Tabular(path, **SIZES, splits=splits)) == [["1", "2"], ["3"], ["5"]]


def test_a_column_splits_and_is_no_feature(tmp_path: Path) -> None:
    rows = [
        [name, i, i, split]
        for i in range(3)
        for name, split in zip("abcd", ("val", "train", "test", "train"), strict=True)
    ]
    source = Tabular(
        write(tmp_path / "t.csv", *rows, header="task,x,target,part"), **SIZES, split_column="part"
    )
    assert names(source) == [["b", "d"], ["a"], ["c"]]
    assert source.input_shape == (1,)


@given(
    tasks=st.lists(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1),
        min_size=3,
        max_size=12,
        unique=True,
    ),
    way=st.sampled_from(["file", "column", "fractions"]),
    shares=st.tuples(*[st.integers(1, 5)] * 3),
    standardise=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
    data=st.data(),
)
def test_no_task_of_one_split_is_ever_in_another(
    tmp_path_factory, tasks, way, shares, **drawn
) -> None:
    standardise, seed, data = drawn["standardise"], drawn["seed"], drawn["data"]
    folder = tmp_path_factory.mktemp("table")
    # Every split has a task; the others fall anywhere.
    rest = data.draw(
        st.lists(st.sampled_from(SPLITS), min_size=len(tasks) - 3, max_size=len(tasks) - 3)
    )
    owner = dict(zip(tasks, [*SPLITS, *rest], strict=True))
    order = data.draw(st.permutations([name for name in tasks for _ in range(3)]))
    path = write(
        folder / "t.csv",
        *([name, owner[name], place, -place] for place, name in enumerate(order)),
        header="task,part,x,target",
    )
    (folder / "splits.json").write_text(
        json.dumps({split: [name for name in tasks if owner[name] == split] for split in SPLITS})
    )
    options = {
        "file": {"splits": folder / "splits.json", "features": ["x"]},
        "column": {"split_column": "part"},
        "fractions": {
            "features": ["x"],
            "fractions": tuple(share / sum(shares) for share in shares),
        },
    }[way]
    try:
        source = Tabular(path, shots=1, queries=2, seed=seed, standardise=standardise, **options)
    except RequestError as error:
        assert (way, "split has none of the" in str(error)) == ("fractions", True)
        return
    seen: dict[str, set[str]] = {}
    mean, scale = (
        (source.describe()["standardisation"][key][0] for key in ("mean", "scale"))
        if standardise
        else (0, 1)
    )
    for split in SPLITS:
        batch = getattr(source, split).batch(seed % 7, range(30))
        places = (
            (torch.cat([batch.support_x, batch.query_x], 1).double() * scale + mean)
            .round()
            .long()
            .squeeze(-1)
        )
        assert all(len(set(row)) == 3 for row in places.tolist())
        seen[split] = {order[place] for place in places.flatten().tolist()}
        assert seen[split] <= set(getattr(source, split).rows.names)
        assert way == "fractions" or all(owner[name] == split for name in seen[split])
    assert not any(seen[one] & seen[other] for one, other in combinations(SPLITS, 2))


# Standardisation


def test_standardisation_takes_training_rows_alone(tmp_path: Path) -> None:
    def source(test_value: float) -> Tabular:
        train = [
            ["a", "train", 1, 5],
            ["a", "train", 3, 5],
            ["b", "train", 5, 9],
            ["b", "train", 7, 9],
        ]
        other = [
            [split, split, test_value + i, test_value - i]
            for split in ("val", "test")
            for i in range(2)
        ]
        return Tabular(
            write(tmp_path / "t.csv", *train, *other, header="task,part,x,target"),
            **SIZES,
            split_column="part",
        )

    near, far = source(0), source(1e6)
    assert torch.equal(near.train.rows.values, far.train.rows.values)
    assert (
        near.describe()["standardisation"]
        == far.describe()["standardisation"]
        == {"mean": [4, 7], "scale": [5**0.5, 2]}
    )
    assert (
        far.test.rows.values.tolist()
        == torch.tensor(
            [[(1e6 - 4) / 5**0.5, (1e6 - 7) / 2], [(1e6 - 3) / 5**0.5, (1e6 - 8) / 2]]
        ).tolist()
    )
    for column in (0, 1):
        values = near.train.rows.values[:, column].double()
        assert float(values.mean()) == pytest.approx(0, abs=1e-7)
        assert float(values.std(correction=0)) == pytest.approx(1, abs=1e-7)


def test_a_column_constant_over_the_training_rows_keeps_its_scale(tmp_path: Path) -> None:
    # Sums of 0.1 round, so that the deviation of this column is not exactly 0.
    rows = [
        [split + name, split, 0.1 if split == "train" else 3.1, i]
        for split in SPLITS
        for name in "abc"
        for i in range(2)
    ]
    source = Tabular(
        write(tmp_path / "t.csv", *rows, header="task,part,x,target"), **SIZES, split_column="part"
    )
    assert source.describe()["standardisation"]["scale"][0] == 1
    assert source.train.rows.values[:, 0].tolist() == pytest.approx([0] * 6, abs=1e-15)
    assert source.test.rows.values[:, 0].tolist() == pytest.approx([3] * 6, abs=1e-6)


def test_values_are_float32_only_after_standardisation(tmp_path: Path) -> None:
    # Differences of 1 at 1e9, where neighbouring float32 numbers are 64 apart.
    rows = [[split, split, 10**9 + i, 0.1 + i] for split in SPLITS for i in range(4)]
    path = write(tmp_path / "t.csv", *rows, header="task,part,x,target")
    fine = Tabular(path, **SIZES, split_column="part").train.rows.values[:, 0]
    torch.testing.assert_close(fine, (torch.arange(4.0) - 1.5) / 1.25**0.5)
    raw = Tabular(path, **SIZES, split_column="part", standardise=False).train.rows.values
    assert torch.equal(
        raw, torch.tensor([[10**9 + i, 0.1 + i] for i in range(4)], dtype=torch.float64).float()
    )


def test_a_column_that_its_scale_lifts_out_of_float32_is_named(tmp_path: Path) -> None:
    rows = [[part, part, i * 1e-30, i] for part in SPLITS for i in range(4)]
    rows[-1][2] = 1e20
    path = write(tmp_path / "t.csv", *rows, header="task,part,x,target")
    assert message_of(lambda: Tabular(path, **SIZES, split_column="part")) == (
        f"the table {path}, column 'x': divided by its scale, 1.12e-30, a number is too large for "
        "float32: correct the column, or set standardise to false or to other moments"
    )


# Files


def test_how_a_file_is_written_does_not_matter(tmp_path: Path, table: Path) -> None:
    plain = Tabular(table, **SIZES, **EVEN)
    for separator, character in {"semicolon": ";", "tab": "\t", "bar": "|"}.items():
        other = tmp_path / "other.csv"
        # A byte order mark, line ends, quotes, blanks around numbers and empty lines, as
        # spreadsheets write them.
        rows = [
            [f'"{name}"', f" {x}", target]
            for name, x, target in csv.reader(table.read_text().splitlines()[1:])
        ]
        lines = [character.join(row) for row in [["task", "x", "target"], *rows]]
        other.write_bytes(("\ufeff" + "\r\n".join([*lines, "", ""])).encode())
        assert torch.equal(
            Tabular(other, **SIZES, **EVEN, separator=separator).test.rows.values,
            plain.test.rows.values,
        )


def test_parquet_reads_like_csv(tmp_path: Path, table: Path) -> None:
    rows = list(csv.DictReader(table.read_text().splitlines()))
    columns = {
        "task": [row["task"] for row in rows],
        "x": [int(row["x"]) for row in rows],
        "target": [float(row["target"]) for row in rows],
    }
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=7)
    assert torch.equal(
        Tabular(path, **SIZES, **EVEN).val.rows.values,
        Tabular(table, **SIZES, **EVEN).val.rows.values,
    )
    pq.write_table(pa.table({**columns, "x": [None, *columns["x"][1:]]}), path)
    assert message_of(lambda: Tabular(path)) == (
        f"the table {path}, row 1, column 'x': '' is not a number; correct it, or leave out that "
        "row or column"
    )
    path.write_bytes(b"PAR1")
    assert message_of(lambda: Tabular(path)).startswith(
        f"the table {path} is no readable Parquet file (Parquet file size is 4 bytes"
    )


# What is wrong with a table


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"task,x,target\n", " has a header but no rows: give it some"),
        (
            b"task;x;target\na;1;2\n",
            " reads as one column 'task;x;target': set separator to what stands between its "
            "columns",
        ),
        (b"task,x,x,target\na,1,1,2\n", " has 2 columns 'x': give each a name of its own"),
        (b"task,target\na,1\n", " has no column that is left for the features: add one"),
        (
            b",task,x,target\n0,a,1,2\n",
            " has a column without a name, as an index has: name it, or list the features",
        ),
        (
            b"task,x,target \na,1,2\n",
            " has no column 'target', which the setting targets names; set it to one that it has, "
            "for train by --set 'tasks.settings={task: COLUMN, targets: [COLUMN]}': did you mean "
            "'target '?",
        ),
        (
            b"task,x,target\na,1,2\na ,1,2\n",
            ", row 3: the task 'a ' looks as 'a' does, and would be another one: write both alike",
        ),
        (
            b'task,x,target\n"a,1,2\nb,1,2\n"c,1,2\n',
            ", line 4: text follows a closing quote, so a quote before it may stand for itself, "
            "and rows may be lost: double every quote within a cell, and quote that cell",
        ),
        (
            b"task,x,target\na,1,2\n,1,2\n",
            ", row 3, column 'task' names no task: name one, or leave the row out",
        ),
    ],
)
def test_a_file_that_is_no_table_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    assert message_of(lambda: Tabular(path)) == f"the table {path}{message}"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "Empty CSV file"),
        (b"\n\n", "CSV parse error: Empty CSV file or block: cannot infer number of columns"),
        (b"task,x,target\na,1,2\na,1\n", "CSV parse error: Row #3: Expected 3 columns, got 2: a,1"),
        (
            b"task,x,target\na,1,2\n\na,1,2,3\n",
            "CSV parse error: Row #3: Expected 3 columns, got 4: a,1,2,3",
        ),
        (
            b"task,x,target\na,1,2\na,\xe9,2\n",
            "In CSV column #1: Row #3: CSV conversion error to string: invalid UTF8 data",
        ),
        (
            b'task,x,target\na,1,2\na,"1,2\n',
            'CSV parse error: Row #3: Expected 3 columns, got 2: a,"1,2',
        ),
    ],
)
def test_what_pyarrow_cannot_read_is_named_in_its_words(
    content: bytes, fault: str, tmp_path: Path
) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    assert message_of(lambda: Tabular(path)) == (
        f"the table {path} is no readable CSV file in UTF-8 ({fault}): correct it there"
    )


def test_a_table_in_utf_16_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes("task,x,target\na,1,2\n".encode("utf-16"))
    assert message_of(lambda: Tabular(path)).startswith(
        f"the table {path} is no readable CSV file in UTF-8 ("
    )


@pytest.mark.parametrize(
    ("cell", "fault"),
    [
        ("much", "is not a number"),
        ("", "is not a number"),
        ("1,5", "is not a number"),
        ("nan", "is NaN, Inf or too large for float32"),
        ("-inf", "is NaN, Inf or too large for float32"),
        ("1e39", "is NaN, Inf or too large for float32"),
    ],
)
@pytest.mark.parametrize("column", ["x", "target"])
def test_a_cell_that_is_no_finite_number_is_named(
    cell: str, fault: str, column: str, tmp_path: Path
) -> None:
    rows = [["a", 1, 2], ["b", cell if column == "x" else 1, cell if column == "target" else 2]]
    path = write(tmp_path / "t.csv", *rows)
    assert message_of(lambda: Tabular(path)) == (
        f"the table {path}, row 3, column '{column}': '{cell}' {fault}; correct it, or leave out "
        "that row or column"
    )


def test_a_column_without_numbers_may_be_left_out(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.csv",
        *([name, i, i, "note"] for name in "abc" for i in range(2)),
        header="task,x,target,note",
    )
    assert Tabular(path, **SIZES, **EVEN, features=["x"]).input_shape == (1,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "tusk"}, ("tusk", "task", "did you mean 'task'?")),
        ({"targets": ["target", "score"]}, ("score", "targets", "known: 'task', 'x', 'target'")),
        ({"features": ["X1"]}, ("X1", "features", "known: 'task', 'x', 'target'")),
        ({"split_column": "fold"}, ("fold", "split_column", "known: 'task', 'x', 'target'")),
    ],
)
def test_a_missing_column_is_named_with_the_nearest(
    settings: dict[str, object], message: tuple[str, str, str], table: Path
) -> None:
    column, field, hint = message
    assert message_of(lambda: Tabular(table, **settings)) == (
        f"the table {table} has no column '{column}', which the setting {field} names; set it to "
        "one that it has, for train by "
        f"--set 'tasks.settings={{task: COLUMN, targets: [COLUMN]}}': {hint}"
    )


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.csv"
    assert (
        message_of(lambda: Tabular(path))
        == f"the table {path}: there is no such file; give the path of a CSV or Parquet file"
    )


def test_a_file_that_may_not_be_read_is_named(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("metaplug.tasks.reading.os.open", refuse)
    assert message_of(lambda: Tabular(table)) == (
        f"cannot read the table {table}: Permission denied; give a CSV or Parquet file that you "
        "may read"
    )


def test_a_task_of_too_few_rows_is_named(table: Path) -> None:
    with table.open("a") as file:
        file.write("few,1,2\nfew,1,2\n")
    splits = table.with_name("splits.json")
    splits.write_text('{"train": ["a"], "val": ["b"], "test": ["c", "few"]}')
    assert message_of(lambda: Tabular(table, shots=1, queries=2, splits=splits)) == (
        "1 shots and 2 queries need 3 rows of every task, but the task 'few' of the test split has "
        "2: "
        "lower shots or queries, or leave that task out"
    )


# What is wrong with splits and settings


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"train": ["a", "leathr"], "val": ["b"], "test": ["c"]}',
            ", train: unknown task 'leathr': did you mean 'leather'?",
        ),
        (
            '{"train": ["a", "b"], "val": ["c"], "test": ["c"]}',
            ": the task 'c' stands in the val and in the test split, so it would not be new to the "
            "model: keep it in one",
        ),
        (
            '{"train": ["a"], "valid": ["b"], "test": ["c"]}',
            ": unknown split 'valid': did you mean 'val'?",
        ),
        ('{"train": "a"}', f" are not lists of task names by split: write {FORM}"),
    ],
)
def test_wrong_splits_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.csv", *([name, i, i] for name in ("a", "b", "c", "leather") for i in range(2))
    )
    splits = tmp_path / "splits.json"
    splits.write_text(content)
    assert (
        message_of(lambda: Tabular(path, **SIZES, splits=splits)) == f"the splits {splits}{message}"
    )


def test_a_split_without_tasks_is_refused(table: Path) -> None:
    message = (
        "the {} split has none of the 10 tasks of the table {}: give it some, by splits, by "
        "split_column or by a larger share in fractions"
    )
    assert message_of(lambda: Tabular(table, **SIZES, fractions=(0.9, 0.0, 0.1))) == message.format(
        "val", table
    )
    splits = table.with_name("splits.json")
    splits.write_text('{"val": ["b"], "test": []}')
    assert message_of(lambda: Tabular(table, **SIZES, splits=splits)) == message.format(
        "train", table
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            ["a", 1, 2, "val"],
            ": the task 'a' stands in the train and in the val split, so it would not be new to "
            "the model: keep it in one",
        ),
        (["c", 1, 2, "tset"], ", column 'part': unknown split 'tset': did you mean 'test'?"),
    ],
)
def test_a_wrong_split_in_a_row_is_named(row: list[object], message: str, tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.csv",
        ["a", 1, 2, "train"],
        ["b", 1, 2, "val"],
        row,
        header="task,x,target,part",
    )
    assert (
        message_of(lambda: Tabular(path, **SIZES, split_column="part"))
        == f"the table {path}, row 4{message}"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"features": ["x", "task"]},
            "tabular: the column 'task' is named twice, by task and by features: name it once",
        ),
        (
            {"features": ["target"]},
            "tabular: the column 'target' is named twice, by features and by targets: name it once",
        ),
        (
            {"split_column": "target"},
            "tabular: the column 'target' is named twice, by split_column and by targets: name it "
            "once",
        ),
        (
            {"targets": ["x", "x"]},
            "tabular: the column 'x' is named twice, by targets and by targets: name it once",
        ),
        (
            {"targets": []},
            "tabular: targets = []: tuple should have at least 1 item after validation, not 0",
        ),
        (
            {"splits": "s.json", "split_column": "p"},
            "tabular: splits and split_column both split the tasks: give one of them",
        ),
        (
            {"fractions": (0.6, 0.3, 0.2)},
            "tabular: fractions = (0.6, 0.3, 0.2): they must be at least 0 and sum to 1",
        ),
        (
            {"separator": ";"},
            "tabular: separator = ';': input should be 'comma', 'semicolon', 'tab' or 'bar'",
        ),
        ({"target": "x"}, "tabular: unknown field 'target': did you mean 'targets'?"),
        ({"shots": 0}, "tasks: shots = 0: input should be greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], message: str, table: Path) -> None:
    assert message_of(lambda: Tabular(table, **{**SIZES, **EVEN, **settings})) == message
