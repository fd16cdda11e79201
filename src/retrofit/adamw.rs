//! AdamW (arXiv 1711.05101) over named parameters, its whole state in one file.

use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::{collections::BTreeMap, path::Path};

/// Tensors by name.
pub type Named = BTreeMap<String, Tensor>;

/// What the optimizer is told once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of their squares.
    pub beta2: f64,
    /// Added to the root of that mean.
    pub eps: f64,
    /// Share of a parameter that a step of rate 1 takes away; vectors (norms, biases) are spared.
    pub weight_decay: f64,
    /// The largest norm of all gradients together; longer ones are scaled down to it.
    pub clip: f64,
}

impl Default for AdamWConfig {
    /// Those of NVIDIA's recipe for DMS.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, clip: 1.0 }
    }
}

/// Parameters, f32, with the moments of their gradients.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    params: Named,
    mean: Named,
    square: Named,
    steps: u64,
}

impl AdamW {
    /// An optimizer of `params`, which are f32.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn new(config: AdamWConfig, params: Named) -> Result<Self> {
        let zeros = || params.iter().map(|(name, p)| Ok((name.clone(), p.zeros_like()?))).collect::<Result<Named>>();
        Ok(Self { config, mean: zeros()?, square: zeros()?, params, steps: 0 })
    }

    /// The parameters as they are now.
    pub fn params(&self) -> &Named {
        &self.params
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Takes a step with the gradients of a loss, f32 of the parameters' shapes; one that is absent counts as 0. `rate`: the
    /// learning rate of a parameter, by its name. Returns the norm of all gradients before clipping, an f32 scalar where
    /// they are: nothing here waits for a device.
    ///
    /// # Errors
    /// Those of the tensor library: a gradient of another shape.
    pub fn step(&mut self, gradients: &Named, rate: impl Fn(&str) -> f64) -> Result<Tensor> {
        let AdamWConfig { beta1, beta2, eps, weight_decay, clip } = self.config;
        let norm = norm(gradients)?;
        let scale = (norm.affine(1.0, 1e-12)?.recip()? * clip)?.minimum(1f64)?;
        self.steps += 1;
        // Both means start at 0 and are too small at first by these factors.
        let corrections = [beta1, beta2].map(|beta| 1.0 - beta.powf(self.steps as f64));
        for (name, param) in &mut self.params {
            let (Some(mean), Some(square)) = (self.mean.get_mut(name), self.square.get_mut(name)) else { continue };
            let gradient = match gradients.get(name) {
                Some(gradient) => gradient.broadcast_mul(&scale)?,
                None => param.zeros_like()?,
            };
            *mean = ((&*mean * beta1)? + (&gradient * (1.0 - beta1))?)?;
            *square = ((&*square * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
            let root = (&*square / corrections[1])?.sqrt()?.affine(1.0, eps)?;
            let step = ((&*mean / corrections[0])? / root)?;
            let rate = rate(name);
            let kept = if param.rank() > 1 { 1.0 - rate * weight_decay } else { 1.0 };
            *param = ((&*param * kept)? - (step * rate)?)?;
        }
        Ok(norm)
    }

    /// Everything that the next step depends on, as tensors: `NAME`, `mean.NAME`, `square.NAME`, and `steps`.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub fn state(&self) -> Result<Named> {
        let with = |prefix: &str, named: &Named| -> Vec<(String, Tensor)> {
            named.iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor.clone())).collect()
        };
        let mut all: Named = with("", &self.params).into_iter().collect();
        all.extend(with("mean.", &self.mean));
        all.extend(with("square.", &self.square));
        all.insert("steps".into(), Tensor::new(&[self.steps as i64], &Device::Cpu)?);
        Ok(all)
    }

    /// Takes over a [`AdamW::state`]; `file` is named in errors. On an error nothing is changed.
    ///
    /// # Errors
    /// [`Error::Config`] for a tensor that is missing, of another shape, or no finite number.
    pub fn restore(&mut self, state: &Named, file: &Path) -> Result<()> {
        let bad = |what: String| Error::Config(format!("{}: {what}", file.display()));
        let read = |prefix: &str| -> Result<Named> {
            let take = |(name, param): (&String, &Tensor)| {
                let name_there = format!("{prefix}{name}");
                let found = state.get(&name_there).ok_or_else(|| bad(format!("has no tensor `{name_there}`")))?;
                if found.dims() != param.dims() || found.dtype() != DType::F32 {
                    let (got, expected) = (found.dims(), param.dims());
                    return Err(bad(format!("tensor `{name_there}` is {got:?}, the model asks for f32 {expected:?}")));
                }
                if !found.abs()?.sum_all()?.to_scalar::<f32>()?.is_finite() {
                    return Err(bad(format!("tensor `{name_there}` has numbers that are not finite")));
                }
                Ok((name.clone(), found.to_device(param.device())?))
            };
            self.params.iter().map(take).collect()
        };
        let steps = state.get("steps").ok_or_else(|| bad("has no tensor `steps`".into()))?;
        let steps = steps.flatten_all()?.to_dtype(DType::I64)?.to_vec1::<i64>()?;
        let &[steps] = steps.as_slice() else { return Err(bad("`steps` is no single number".into())) };
        let steps = u64::try_from(steps).map_err(|_| bad(format!("steps={steps} is negative")))?;
        let (params, mean, square) = (read("")?, read("mean.")?, read("square.")?);
        (self.params, self.mean, self.square, self.steps) = (params, mean, square, steps);
        Ok(())
    }
}

/// Euclidean norm of all tensors together, an f32 scalar where they are.
fn norm(named: &Named) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for tensor in named.values() {
        let own = tensor.sqr()?.sum_all()?;
        sum = Some(match sum {
            Some(sum) => (sum + own)?,
            None => own,
        });
    }
    match sum {
        Some(sum) => Ok(sum.sqrt()?),
        None => Ok(Tensor::new(0f32, &Device::Cpu)?),
    }
}

/// Adds gradients to those of the same name.
///
/// # Errors
/// Those of the tensor library: shapes that differ.
pub fn accumulate(sum: &mut Named, gradients: Named) -> Result<()> {
    for (name, gradient) in gradients {
        let total = match sum.remove(&name) {
            Some(before) => (before + gradient)?,
            None => gradient,
        };
        sum.insert(name, total);
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn named(values: &[f32]) -> Named {
        Named::from([("w".to_string(), Tensor::new(values, &Device::Cpu).unwrap())])
    }

    fn values(named: &Named) -> Vec<f32> {
        named["w"].to_vec1().unwrap()
    }

    /// The formula of the paper, in f64.
    #[test]
    fn follows_the_formula() {
        let config = AdamWConfig { clip: 1e9, ..AdamWConfig::default() };
        let mut optimizer = AdamW::new(config, named(&[1.0, -2.0])).unwrap();
        let (mut w, mut m, mut v) = ([1.0f64, -2.0], [0.0; 2], [0.0; 2]);
        for step in 1..=5 {
            let gradient = [0.3 * step as f64, -0.7];
            optimizer.step(&named(&gradient.map(|g| g as f32)), |_| 0.1).unwrap();
            for i in 0..2 {
                m[i] = 0.9 * m[i] + 0.1 * gradient[i];
                v[i] = 0.95 * v[i] + 0.05 * gradient[i] * gradient[i];
                let (m, v) = (m[i] / (1.0 - 0.9f64.powi(step)), v[i] / (1.0 - 0.95f64.powi(step)));
                w[i] -= 0.1 * m / (v.sqrt() + 1e-8);
            }
        }
        values(optimizer.params()).iter().zip(w).for_each(|(&a, b)| assert!((a as f64 - b).abs() < 1e-5));
    }

    #[test]
    fn long_gradients_are_clipped_and_their_norm_is_told() {
        let mut plain = AdamW::new(AdamWConfig { clip: 1e9, ..AdamWConfig::default() }, named(&[0.0, 0.0])).unwrap();
        let mut clipped = AdamW::new(AdamWConfig::default(), named(&[0.0, 0.0])).unwrap();
        plain.step(&named(&[0.6, 0.8]), |_| 0.1).unwrap();
        let norm = clipped.step(&named(&[60.0, 80.0]), |_| 0.1).unwrap();
        assert_eq!(norm.to_scalar::<f32>().unwrap(), 100.0);
        let square = |optimizer: &AdamW| values(&optimizer.square);
        square(&plain).iter().zip(square(&clipped)).for_each(|(a, b)| assert!((a - b).abs() < 1e-6));
    }

    #[test]
    fn a_restored_state_goes_on_alike() {
        let mut through = AdamW::new(AdamWConfig::default(), named(&[1.0, 2.0])).unwrap();
        through.step(&named(&[0.1, -0.2]), |_| 0.1).unwrap();
        let mut resumed = AdamW::new(AdamWConfig::default(), named(&[0.0, 0.0])).unwrap();
        resumed.restore(&through.state().unwrap(), Path::new("x")).unwrap();
        for optimizer in [&mut through, &mut resumed] {
            optimizer.step(&named(&[0.5, 0.5]), |_| 0.1).unwrap();
        }
        assert_eq!(values(through.params()), values(resumed.params()));
        assert_eq!(resumed.steps(), 2);
    }

    #[test]
    fn a_damaged_state_is_refused_and_changes_nothing() {
        let mut optimizer = AdamW::new(AdamWConfig::default(), named(&[1.0])).unwrap();
        let good = optimizer.state().unwrap();
        let cases: [(&str, Option<Tensor>); 4] = [
            ("mean.w", None),
            ("w", Some(Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap())),
            ("square.w", Some(Tensor::new(&[f32::NAN], &Device::Cpu).unwrap())),
            ("steps", Some(Tensor::new(&[-1i64], &Device::Cpu).unwrap())),
        ];
        for (name, replacement) in cases {
            let mut state = good.clone();
            state.remove(name);
            state.extend(replacement.map(|tensor| (name.to_string(), tensor)));
            let error = optimizer.restore(&state, Path::new("last.safetensors")).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("last.safetensors"), "{error}");
        }
        assert_eq!((values(optimizer.params()), optimizer.steps()), (vec![1.0], 0));
    }
}
