"""What the model expects of its data: chat text, tokenizer, image and video geometry."""

from molmo2.processing.processor import Processor, ProcessorSettings, Prompt, build_processor
from molmo2.processing.tokenizer import Tokenizer, TokenizerError

__all__ = ["Processor", "ProcessorSettings", "Prompt", "Tokenizer", "TokenizerError", "build_processor"]
