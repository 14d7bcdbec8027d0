"""vLLM's connector for hidden states, without pinned memory: `kv_connector_module_path` names this module.

The released one ends its engine on a machine without an accelerator, at the first request: "RuntimeError:
pin_memory=True requires a CUDA or other accelerator backend; no pinned memory allocator is available on this system."
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
)

EMPTY_LIKE = torch.empty_like


def pageable(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
    return EMPTY_LIKE(*args, **options)


class Copied:
    """In place of the CPU runner's event: "'_EventPlaceholder' object has no attribute 'query'"."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class UnpinnedHiddenStatesConnector(ExampleHiddenStatesConnector):
    def _submit_async_write(self, pending: PendingSave) -> None:
        with mock.patch.object(torch, "empty_like", pageable):
            super()._submit_async_write(pending)
        if pending.req_id in self._req_copy_events:
            self._req_copy_events[pending.req_id] = Copied()
