#!/bin/sh
# Step 1 of RWKV-LM's MiniPile demo: write the initial weights, rwkv-init.pth, into PROJ_DIR.
# examples/demo-training-settings.sh lists what can be set, and how. Flags given here come last.
set -eu
. "$(dirname "$0")/examples/demo-training-settings.sh"

exec "$PYTHON" "$HERE/train.py" --train_stage 1 --wandb "" --proj_dir "$PROJ_DIR" \
  --data_file "$DATA" --data_type binidx --vocab_size "$VOCAB_SIZE" --my_testing "$MODEL_TYPE" \
  --ctx_len "$CTX_LEN" --my_exit_tokens "$EXIT_TOKENS" --magic_prime "$MAGIC_PRIME" \
  --n_layer "$N_LAYER" --n_embd "$N_EMBD" --head_size "$HEAD_SIZE" \
  --epoch_count 1 --epoch_begin 0 --epoch_save 1 --micro_bsz 1 \
  --lr_init 1e-5 --lr_final 1e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 \
  --weight_decay 0 --grad_cp 1 --accelerator cpu --devices 1 --num_nodes 1 \
  --precision "$PRECISION" --strategy "$STRATEGY" "$@"
