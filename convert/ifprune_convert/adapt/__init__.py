"""One command from anybody's model to a sliced checkpoint that is worth running (`ifprune adapt`).

config      the settings, and the names of the stages
plan        how the hours are divided, and what fits into them
job         what is done so far, and the clock, over kills
answers     prompts, and the model's own answers to them
run         the stages
report      the page that says what it is worth
"""

from .config import STAGES, AdaptConfig
from .run import Adaptation, adapt

__all__ = ["STAGES", "AdaptConfig", "Adaptation", "adapt"]
