"""Programs in the manner of guides, by topic: see `guide`."""

from integration_tests.guides import contrastive
from integration_tests.guides import custom_steps
from integration_tests.guides import gans
from integration_tests.guides import generative
from integration_tests.guides import graphs
from integration_tests.guides import language
from integration_tests.guides import own_layers
from integration_tests.guides import own_losses
from integration_tests.guides import own_updates
from integration_tests.guides import physics
from integration_tests.guides import retrieval
from integration_tests.guides import sequences
from integration_tests.guides import teachers
from integration_tests.guides import vision
from integration_tests.guides.guide import PROGRAMS
