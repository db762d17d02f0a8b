"""Tasks: batches, the streams that make them, and the sources that hold the data."""

from metaplug.contract.task_batch import TaskBatch
from metaplug.tasks.episodes import ClassImages, EpisodeOptions, ImageEpisodes, TaskStream
from metaplug.tasks.glyphs.source import Glyphs
from metaplug.tasks.images.folder import Folder
from metaplug.tasks.images.labelled import LabelledTasks
from metaplug.tasks.sources import ArrayTasks, ImageSource, TaskSource
from metaplug.tasks.tables.tabular import Tabular
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
    "Sinusoid",
    "Tabular",
    "TaskBatch",
    "TaskSource",
    "TaskStream",
]
