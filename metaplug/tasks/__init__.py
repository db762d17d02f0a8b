"""Tasks: batches, the streams that make them, and the sources that hold the data."""

from metaplug.tasks.batch import TaskBatch
from metaplug.tasks.episodes import ClassImages, EpisodeOptions, ImageEpisodes, TaskStream
from metaplug.tasks.folder import Folder
from metaplug.tasks.glyphs import Glyphs
from metaplug.tasks.harmonic import Harmonic
from metaplug.tasks.labelled import LabelledTasks
from metaplug.tasks.sinusoid import Sinusoid
from metaplug.tasks.sources import ArrayTasks, ImageSource, TaskSource
from metaplug.tasks.tabular import Tabular

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
