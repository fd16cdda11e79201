//! What a model's logits say of the next token.

/// Index of the largest logit; the first of equals.
pub(crate) fn argmax(logits: &[f32]) -> u32 {
    let better = |best: (usize, f32), (i, &x): (usize, &f32)| if x > best.1 { (i, x) } else { best };
    logits.iter().enumerate().fold((0, f32::NEG_INFINITY), better).0 as u32
}

/// Log-softmax in f64.
pub(crate) fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let sum: f64 = logits.iter().map(|&x| (x as f64 - top).exp()).sum();
    logits.iter().map(|&x| x as f64 - top - sum.ln()).collect()
}

/// KL(p || q) in nats, of log-probabilities. What p never says adds nothing.
pub(crate) fn kl<P: Copy + Into<f64>>(log_p: &[P], log_q: &[f64]) -> f64 {
    let term = |(&log_p, &log_q): (&P, &f64)| {
        let log_p: f64 = log_p.into();
        if log_p == f64::NEG_INFINITY { 0.0 } else { log_p.exp() * (log_p - log_q) }
    };
    log_p.iter().zip(log_q).map(term).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_that_of_the_distributions() {
        let p = [0.0, 2f32.ln(), 0.0]; // 1/4, 1/2, 1/4
        assert_eq!(argmax(&p), 1);
        let divergence = |q: &[f32]| kl(&log_softmax(&p), &log_softmax(q));
        assert!(divergence(&p.map(|x| x + 5.0)).abs() < 1e-6, "the same");
        let uniform = divergence(&[1.0; 3]);
        assert!((uniform - (0.5 * 0.75f64.ln() + 0.5 * 1.5f64.ln())).abs() < 1e-6, "{uniform}");
    }

    #[test]
    fn tokens_that_are_never_said_add_nothing_and_missing_ones_all() {
        let (two, three) = (log_softmax(&[0.0, 0.0, f32::NEG_INFINITY]), log_softmax(&[0.0; 3]));
        assert!((kl(&two, &three) - 1.5f64.ln()).abs() < 1e-12);
        assert_eq!(kl(&three, &two), f64::INFINITY);
        assert!(kl(&three, &log_softmax(&[f32::NAN; 3])).is_nan());
    }
}
