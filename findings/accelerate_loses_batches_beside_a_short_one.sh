#!/usr/bin/env bash
# accelerate 1.15.0 silently loses full batches where a batch sampler yields a short batch before its end, even with
# `even_batches=False`, which the documentation asks for when the sizes of the batches vary.
#
# A batch sampler that keeps kinds of records apart (with an image and without, or one dataset after another) ends every
# kind with a batch that may be short. Where the sampler has a `batch_size`, as a subclass of torch's `BatchSampler` does,
# accelerate takes a short batch of the last process for the end of the data: no process gets its batch of that step, and
# training continues with the next step. On eight GPUs that is seven full batches and the short one. A short batch of any
# other process is handed out, so what is lost depends on the order of the epoch and on the number of processes. A sampler
# whose `batch_size` is None loses nothing.
#
# Seen with torch 2.13.0, two processes, three records with an image (0 to 2) and six without (3 to 8), batches of two:
#   sampler: [[0, 1], [2], [3, 4], [5, 6], [7, 8]]
#   batch_size 2: process 0 [[3, 4], [7, 8]], process 1 [[5, 6]], lost [0, 1, 2]
#   batch_size None: process 0 [[0, 1], [3, 4], [7, 8]], process 1 [[2], [5, 6]], lost []
#
# Fails when the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 accelerate==1.15.0
"$folder/venv/bin/python" - <<'PYTHON'
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader


class OneKindPerBatch(BatchSampler):
    def __init__(self, kinds: list[range], batch_size: int) -> None:
        super().__init__([record for kind in kinds for record in kind], batch_size, drop_last=False)
        self.batches = [batch for kind in kinds for batch in BatchSampler(kind, batch_size, drop_last=False)]

    def __iter__(self):
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


lost = {}
for batch_size in (2, None):
    sampler = OneKindPerBatch([range(3), range(3, 9)], 2)
    if batch_size == 2:
        print("sampler:", list(sampler))
    sampler.batch_size = batch_size
    loader = DataLoader(range(9), batch_sampler=sampler)
    # What `Accelerator.prepare` calls, in each of two processes, with DataLoaderConfiguration(even_batches=False).
    settings = dict(num_processes=2, put_on_device=False, even_batches=False)
    shards = [prepare_data_loader(loader, process_index=process, **settings) for process in range(2)]
    seen = [[batch.tolist() for batch in shard] for shard in shards]
    lost[batch_size] = sorted(set(range(9)) - {record for shard in seen for batch in shard for record in batch})
    print(f"batch_size {batch_size}: process 0 {seen[0]}, process 1 {seen[1]}, lost {lost[batch_size]}")
assert lost == {2: [0, 1, 2], None: []}
PYTHON
