"""What the package rwkv_trainer publishes, under the names it publishes; its user page is
docs/sequences.md. Nothing heavy is imported before it is used.
"""

from rwkvtune import __version__
from rwkvtune.data.sequences import DataPipeline, JsonlToBinIdxConverter, NumpyToJsonlConverter
from rwkvtune.data.tokenizers.custom import BaseTokenizer
from rwkvtune.data.tokenizers.generic import GenericTokenizer, create_vocab_file_from_tokens
from rwkvtune.data.tokenizers.integers import (
    AngleTokenizer,
    IntegerTokenizer,
    create_default_vocab_file,
)
from rwkvtune.data.tokenizers.world import WorldTokenizer
from rwkvtune.pipeline.checkpoints import (
    DetectedModelConfig,
    inspect_rwkv_checkpoint,
    load_checkpoint_for_training,
    validate_checkpoint_compatibility,
)
from rwkvtune.pipeline.config import DataConfig, ModelConfig, TrainingConfig
from rwkvtune.pipeline.run import RWKVTrainingPipeline, TrainingResult

__all__ = [
    "AngleTokenizer",
    "BaseTokenizer",
    "DataConfig",
    "DataPipeline",
    "DetectedModelConfig",
    "GenericTokenizer",
    "IntegerTokenizer",
    "JsonlToBinIdxConverter",
    "ModelConfig",
    "NumpyToJsonlConverter",
    "RWKVTrainingPipeline",
    "TrainingConfig",
    "TrainingResult",
    "WorldTokenizer",
    "__version__",
    "create_default_vocab_file",
    "create_vocab_file_from_tokens",
    "inspect_rwkv_checkpoint",
    "load_checkpoint_for_training",
    "validate_checkpoint_compatibility",
]
