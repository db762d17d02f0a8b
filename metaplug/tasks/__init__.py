"""Tasks: batches, the streams that make them, and the sources that hold the data."""

from metaplug.tasks.batch import TaskBatch
from metaplug.tasks.episodes import ClassImages, EpisodeOptions, ImageEpisodes, TaskStream
from metaplug.tasks.folder import Folder
from metaplug.tasks.glyphs import Glyphs
from metaplug.tasks.sinusoid import Sinusoid
from metaplug.tasks.sources import ArrayTasks, ImageSource, TaskSource

__all__ = [
    "ArrayTasks",
    "ClassImages",
    "EpisodeOptions",
    "Folder",
    "Glyphs",
    "ImageEpisodes",
    "ImageSource",
    "Sinusoid",
    "TaskBatch",
    "TaskSource",
    "TaskStream",
]
