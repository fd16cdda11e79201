use crate::policy::Policy;

crate::policy_params! {
    /// Keeps everything: dense attention.
    pub struct Full = "full", paper "dense attention" {}
}

impl Policy for Full {}
