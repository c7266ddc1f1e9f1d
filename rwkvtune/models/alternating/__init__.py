"""Decoders some of whose layers see only one modality, and LLaVA-OneVision around them."""
