//! Maps of the numbers of queries and keys.

/// An elementwise map φ of queries and keys. All but [`FeatureMap::Identity`] give numbers that are not negative, as a
/// normaliser needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum FeatureMap {
    /// φ(x) = x.
    #[default]
    Identity,
    /// φ(x) = elu(x) + 1: x + 1 above 0, e^x below (Katharopoulos et al. 2020, eq. 7).
    EluPlusOne,
    /// φ(x) = max(x, 0).
    Relu,
    /// φ(x) = e^x, saturated at 2^127.
    Exp,
}

impl FeatureMap {
    /// φ(x) in f64.
    pub fn apply(self, x: f64) -> f64 {
        match self {
            FeatureMap::Identity => x,
            FeatureMap::EluPlusOne if x > 0.0 => x + 1.0,
            FeatureMap::EluPlusOne | FeatureMap::Exp => x.exp(),
            // Not f64::max, which would turn NaN into 0.
            FeatureMap::Relu if x < 0.0 => 0.0,
            FeatureMap::Relu => x,
        }
    }
}
