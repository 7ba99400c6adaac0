"""A generated set with sound: what happens is drawn (`spec`), rendered (`picture`, `sound`), asked about (`questions`),
and measured for what can be guessed (`floors`)."""

from .floors import FLOORS, floors
from .write import TABLES, Look, write_world, write_worlds

__all__ = ["FLOORS", "TABLES", "Look", "floors", "write_world", "write_worlds"]
