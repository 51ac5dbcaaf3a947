//! Compiles the `.proto` files without an installed `protoc`.

/// What definitions and the small state of a shard are made of: checkpoints hold them as JSON.
const IN_CHECKPOINTS: [&str; 39] = [
    "JobSpec",
    "Variable",
    "VariableSpec",
    "TableSpec",
    "DenseSpec",
    "Init",
    "UniformInit",
    "NormalInit",
    "Optimizer",
    "Schedule",
    "StepSchedule",
    "StalenessScaling",
    "CosineSchedule",
    "Sgd",
    "Adagrad",
    "Adam",
    "AdamW",
    "Momentum",
    "RmsProp",
    "Ftrl",
    "ClosedSessions",
    "CutSmall",
    "CutVariable",
    "CutEpoch",
    "CutCell",
    "CutRefusal",
    "Refusal",
    "LedgerRecord",
    "LedgerPlan",
    "LedgerHolder",
    "PositionRange",
    "Board",
    "Tick",
    "Left",
    "Round",
    "Regime",
    "Consistency",
    "VariableMode",
    "ConsistencyMode",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "types",
        "consistency",
        "coordinator",
        "operator",
        "raft",
        "shard",
        "clock",
        "replica",
        "checkpoint",
        "ledger",
    ]
    .map(|name| format!("downpour/v1/{name}.proto"));
    for file in &files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(&files, ["."])?;
    // `bytes` fields become `Bytes`: slices of the receive buffer, not copies.
    let mut builder = tonic_prost_build::configure().bytes(".");
    for name in IN_CHECKPOINTS {
        let path = format!(".downpour.v1.{name}");
        builder = builder
            .type_attribute(&path, "#[derive(serde::Serialize, serde::Deserialize)]")
            .message_attribute(&path, "#[serde(default, deny_unknown_fields)]")
            .enum_attribute(&path, "#[serde(rename_all = \"snake_case\")]");
    }
    builder.compile_fds(descriptors)?;
    Ok(())
}
