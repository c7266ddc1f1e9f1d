#!/bin/sh
# Step 2 of RWKV-LM's MiniPile demo: train from the newest state in PROJ_DIR, which
# demo-training-prepare.sh has begun; the same command goes on with a run that was stopped.
# examples/demo-training-settings.sh lists what can be set, and how. Flags given here come last.
set -eu
. "$(dirname "$0")/examples/demo-training-settings.sh"

if [ -n "$EPOCH_STEPS" ]; then
  set -- --epoch_steps "$EPOCH_STEPS" "$@"
fi
exec "$PYTHON" "$HERE/train.py" --train_stage 3 --load_model 0 --wandb "$WANDB" \
  --proj_dir "$PROJ_DIR" \
  --data_file "$DATA" --data_type binidx --vocab_size "$VOCAB_SIZE" --my_testing "$MODEL_TYPE" \
  --ctx_len "$CTX_LEN" --my_exit_tokens "$EXIT_TOKENS" --magic_prime "$MAGIC_PRIME" \
  --n_layer "$N_LAYER" --n_embd "$N_EMBD" --head_size "$HEAD_SIZE" \
  --epoch_count "$EPOCH_COUNT" --epoch_begin 0 --epoch_save "$EPOCH_SAVE" --micro_bsz "$M_BSZ" \
  --lr_init "$LR_INIT" --lr_final "$LR_FINAL" --warmup_steps 10 --beta1 0.9 --beta2 0.99 \
  --adam_eps 1e-18 --weight_decay 0.001 --grad_cp "$GRAD_CP" \
  --accelerator "$ACCELERATOR" --devices "$DEVICES" --num_nodes "$NODES" \
  --precision "$PRECISION" --strategy "$STRATEGY" --enable_progress_bar True \
  --ds_bucket_mb 200 "$@"
