"""Import megatron-core once, without its warnings, in the server that `bench.ranks` forks from."""

import logging
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Transformer Engine and Apex are missing, and not needed
    logging.disable(logging.WARNING)
    import megatron.core  # noqa: F401
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401
    import megatron.core.models.gpt.gpt_model  # noqa: F401
    import megatron.core.pipeline_parallel.schedules  # noqa: F401
    import megatron.core.tensor_parallel  # noqa: F401
