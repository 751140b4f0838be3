"""One command from anybody's model to a sliced checkpoint that is worth running (`ifprune adapt`).

config      the settings, and the names of the stages
plan        how the hours are divided, and what fits into them
memory      what each stage takes of memory and disk
job         what is done so far, and the clock, over kills
answers     prompts, and the model's own answers to them
workspace   folders, displays and clock, which all stages use
training    the stages from the source to healed weights
evaluation  the last stage: what it is worth
report      the page that says so
result      puts the result in its place
run         `adapt`: all of it in order
"""

from .config import STAGES, AdaptConfig
from .result import Adaptation
from .run import adapt

__all__ = ["STAGES", "AdaptConfig", "Adaptation", "adapt"]
