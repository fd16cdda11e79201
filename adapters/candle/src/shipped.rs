//! Gates inside the program, for models known by the hash of their weights. `gates/` has them with their logs.

use crate::folder::Folder;

/// Gates of a model.
#[derive(Debug)]
pub(crate) struct Shipped {
    /// As `dms:weights=` names them.
    pub(crate) name: &'static str,
    /// SHA-256 of the model's weights.
    model: &'static str,
    /// `model.safetensors` and `config.json`.
    pub(crate) folder: Folder<'static>,
}

macro_rules! shipped {
    ($name:literal, $model:expr) => {
        Shipped {
            name: $name,
            model: $model,
            folder: Folder::Embedded(&[
                ("config.json", include_bytes!(concat!("../gates/", $name, "/config.json"))),
                ("model.safetensors", include_bytes!(concat!("../gates/", $name, "/gates.safetensors"))),
            ]),
        }
    };
}

const SMOLLM2: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
const QWEN_CODER: &str = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32";

/// The first of a model is what `dms` takes: the one nearest to the dense model.
const ALL: &[Shipped] = &[
    shipped!("smollm2-135m-instruct-w256-4x", SMOLLM2),
    shipped!("smollm2-135m-instruct-w256-8x", SMOLLM2),
    shipped!("smollm2-135m-instruct-w64-4x", SMOLLM2),
    shipped!("qwen2.5-coder-0.5b-instruct-w256-4x", QWEN_CODER),
    shipped!("qwen2.5-coder-0.5b-instruct-w256-7x", QWEN_CODER),
    shipped!("qwen2.5-coder-0.5b-instruct-w64-4x", QWEN_CODER),
];

/// Gates of the model with this hash: those of a name, else the first.
pub(crate) fn find(model: &str, name: Option<&str>) -> Option<&'static Shipped> {
    ALL.iter().find(|gates| gates.model == model && name.is_none_or(|name| name == gates.name))
}

/// Whether a name is that of some model's gates.
pub(crate) fn is_known(name: &str) -> bool {
    ALL.iter().any(|gates| gates.name == name)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_model_finds_its_gates() {
        let first = &ALL[0];
        assert_eq!(find(first.model, None).unwrap().name, first.name);
        assert_eq!(find(first.model, Some(first.name)).unwrap().name, first.name);
        assert!(find(first.model, Some("another")).is_none() && find("0", None).is_none());
    }

    #[test]
    fn every_shipped_model_is_the_one_its_gates_were_trained_for() {
        for gates in ALL {
            let config: serde_json::Value =
                serde_json::from_slice(&gates.folder.required("config.json").unwrap()).unwrap();
            assert_eq!(config["kvpolicy_model_sha256"], gates.model, "{}", gates.name);
        }
    }
}
