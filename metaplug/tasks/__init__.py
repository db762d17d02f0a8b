"""Tasks: where they come from, and how one seed draws each of them.

`sources` holds the base of every source, `splits` the division into train, val and test. The
sources stand in `glyphs`, `images`, `tables`, `text`, `toys` and `torchmeta`. `choices` chooses the
classes and examples of few-shot tasks, with the counter-based random numbers of `draws`;
`episodes` gathers them. `adapters` makes a stream of whatever `fit` and `evaluate` are given; `own`
has those of a user's own tasks. `identities` tells whether two streams share a class; `cache` keeps
what takes long to read; `reading` opens files of others safely.
"""

from metaplug.contract.task_batch import TaskBatch
from metaplug.tasks.episodes import EpisodeOptions, ImageEpisodes, TaskStream
from metaplug.tasks.glyphs.source import Glyphs
from metaplug.tasks.images.arrays import ArrayTasks
from metaplug.tasks.images.class_images import ClassImages
from metaplug.tasks.images.folder import Folder
from metaplug.tasks.images.labelled import LabelledTasks
from metaplug.tasks.own.promises import Promises
from metaplug.tasks.sources import ImageSource, TaskSource
from metaplug.tasks.tables.tabular import Tabular
from metaplug.tasks.text.source import Text
from metaplug.tasks.toys.harmonic import Harmonic
from metaplug.tasks.toys.sinusoid import Sinusoid

__all__ = [
    "ArrayTasks",
    "ClassImages",
    "EpisodeOptions",
    "Folder",
    "Glyphs",
    "Harmonic",
    "ImageEpisodes",
    "ImageSource",
    "LabelledTasks",
    "Promises",
    "Sinusoid",
    "Tabular",
    "TaskBatch",
    "TaskSource",
    "TaskStream",
    "Text",
]
