"""The speculative decoder: engine, proposers, verification rules, sampling, caches."""

from deepspec.decoding.chain import Eagle3Proposer
from deepspec.decoding.engine import SpeculativeEngine
from deepspec.decoding.lookup import LookupProposer
from deepspec.decoding.probe import check_decodable
from deepspec.decoding.proposers import DSparkProposer, Proposal, Proposer
from deepspec.decoding.proposing import proposer_of
from deepspec.decoding.requests import Completion, Request, Round, Timing
from deepspec.decoding.verification import VERIFICATION_RULES, Verdict

__all__ = [
    "VERIFICATION_RULES",
    "Completion",
    "DSparkProposer",
    "Eagle3Proposer",
    "LookupProposer",
    "Proposal",
    "Proposer",
    "Request",
    "Round",
    "SpeculativeEngine",
    "Timing",
    "Verdict",
    "check_decodable",
    "proposer_of",
]
