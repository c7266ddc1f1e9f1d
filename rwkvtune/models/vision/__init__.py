"""Pictures for a language model: frozen encoder, trained adapter, RWKV-7."""
