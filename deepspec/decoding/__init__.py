"""The speculative decoder: engine, proposers, verification rules, sampling, caches."""

from deepspec.decoding.engine import SpeculativeEngine
from deepspec.decoding.proposers import DSparkProposer, Proposal, Proposer
from deepspec.decoding.requests import Completion, Request, Round, Timing
from deepspec.decoding.verification import VERIFICATION_RULES, Verdict

__all__ = [
    "VERIFICATION_RULES",
    "Completion",
    "DSparkProposer",
    "Proposal",
    "Proposer",
    "Request",
    "Round",
    "SpeculativeEngine",
    "Timing",
    "Verdict",
]
