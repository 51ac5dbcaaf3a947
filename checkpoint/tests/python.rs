//! What Python makes of a shard's file.

mod support;

use std::process::Command;

use downpour_checkpoint::write::Scratch;
use downpour_core::id::{Lsn, ShardId};
use support::{DIM, bytes_of, pieces, python, write};

const READ: &str = r#"
import json, struct, sys
import numpy as np
from safetensors.numpy import load_file
from safetensors import safe_open
path, dim = sys.argv[1], int(sys.argv[2])
tensors = load_file(path)
keys, rows = tensors["data.0/keys"], tensors["data.0/rows"]
assert keys.dtype == np.uint64 and rows.dtype == np.float32, (keys.dtype, rows.dtype)
assert rows.shape == (len(keys), dim) and len(keys) == 600, rows.shape
want = keys[:, None].astype(np.float32) * 100 + np.arange(3 * dim, dtype=np.float32)
got = np.concatenate([rows, tensors["data.0/adam_m"], tensors["data.0/adam_v"]], axis=1)
assert (got == want).all()
assert (tensors["data.0/lsn"] == (2 << 40 | 600)).all()
blocks, values = tensors["data.0/keys/blocks"], tensors["data.0/keys/values"]
assert blocks.dtype == np.uint32
at = 0
for block in blocks:
    n = min(4, 21 - 4 * int(block))
    assert (values[at:at + n] == block * 100 + np.arange(n)).all(), block
    at += n
assert at == len(values) == len(tensors["data.0/keys/adam_v"])
with safe_open(path, "numpy") as file:
    state = json.loads(file.metadata()["downpour"])
assert state["epoch"] == 2 and state["state"]["clock"] == 12 and len(state["cells"]) == 300
assert state["state"]["variables"][0]["steps"] == 600
print("read", len(tensors), "tensors")
"#;

#[test]
fn python_reads_keys_rows_and_optimizer_slots() {
    let Some(path) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("shard.safetensors");
    let shard = ShardId(1);
    let pieces = pieces(shard, Lsn(0), 600);
    std::fs::write(&file, bytes_of(write(shard, &pieces, Scratch::default()))).unwrap();
    let mut python = Command::new("python3");
    python.args(["-c", READ]).arg(&file).arg(DIM.to_string()).env("PYTHONPATH", path);
    let output = python.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "read 15 tensors\n");
}
