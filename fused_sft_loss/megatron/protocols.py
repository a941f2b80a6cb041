"""Types of the Megatron objects that this package uses. Megatron itself is never imported."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor
from torch.distributed import ProcessGroup

#: Takes the data iterator of a pipeline stage, returns a batch by name; see `make_forward_step`.
GetBatch = Callable[[Any], Mapping[str, Any]]
#: A mask [b, s], or a function that returns it when the model runs; see `fused_cross_entropy`.
LossMask = Tensor | Callable[[], Tensor | None] | None


class ParallelState(Protocol):
    """The module megatron.core.parallel_state."""

    def get_tensor_model_parallel_group(self) -> ProcessGroup: ...

    def get_context_parallel_group(self) -> ProcessGroup: ...

    def get_context_parallel_world_size(self) -> int: ...

    def get_data_parallel_group(self, *, with_context_parallel: bool) -> ProcessGroup: ...


class RerunStateMachine(Protocol):
    """megatron.core.rerun_state_machine.RerunStateMachine."""

    def is_unexpectedly_large(self, result: Tensor, threshold: float, context: str) -> bool: ...

    def validate_result(
        self,
        *,
        result: Tensor,
        rejection_func: Callable[[Tensor], Any],
        message: str,
        tolerance: float,
        fatal: bool,
    ) -> None: ...


class PackedSeqParams(Protocol):
    """megatron.core.packed_seq_params.PackedSeqParams."""

    @property
    def cu_seqlens_q(self) -> Tensor | None: ...

    @property
    def cu_seqlens_q_padded(self) -> Tensor | None: ...


class OutputLayer(Protocol):
    """megatron.core.tensor_parallel.ColumnParallelLinear."""

    sequence_parallel: bool

    def __call__(
        self, hidden_states: Tensor, *, weight: Tensor | None, runtime_gather_output: bool | None
    ) -> tuple[Tensor, Tensor | None]: ...


class LanguageModel(Protocol):
    """megatron.core's LanguageModule, such as GPTModel. Only the last stage has an output layer."""

    config: Any
    output_layer: OutputLayer
    build_schedule_plan: Callable[..., Any]  # of GPTModel and HybridModel
