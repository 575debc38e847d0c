#!/bin/bash
#SBATCH --job-name=tokenize
#SBATCH --array=0-63
#SBATCH --cpus-per-task=32
#SBATCH --requeue
# One task per array index; a requeued one continues where it was killed. Then, once: dsmoe tokenize --merge $OUT
SOURCES=${SOURCES:-/shared/corpus} TOKENIZER=${TOKENIZER:-/shared/moe16b} OUT=${OUT:-/shared/shards}
exec dsmoe tokenize $SOURCES --tokenizer "$TOKENIZER" --out "$OUT" \
  --task "$SLURM_ARRAY_TASK_ID" --tasks "$SLURM_ARRAY_TASK_COUNT"
