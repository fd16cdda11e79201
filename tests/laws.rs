//! The laws of the cache, each against an oracle written another way than the code: dense attention in f64 with the
//! mask written out, plain lists, recounts.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

mod laws {
    mod accounts;
    mod budgets;
    mod exact;
    mod exhaustion;
    mod forks;
    mod indifference;
    mod masks;
    mod misuse;
    mod ranks;
}
