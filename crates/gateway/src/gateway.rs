//! What all handlers share: models, keys, budgets, and whether we are still taking requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pomona_text::{ChatTemplate, Tokenizer};
use pomona_types::{Replica, RequestId};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::auth::Keys;
use crate::body::BodyBudget;
use crate::config::{Config, SamplingDefaults};
use crate::error::ApiError;
use crate::metrics::{ModelMetrics, Responses};

/// Seconds after which a client that met a full house may come again.
const RETRY_AFTER_S: u32 = 1;

/// A model and what is needed to talk to it in text.
pub struct ServedModel {
    /// Its names for clients, at least one; the first is the canonical one.
    pub names: Vec<String>,
    /// Whoever continues sequences.
    pub replica: Arc<dyn Replica>,
    /// The model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The model's chat template; without one, chat is refused.
    pub template: Option<Arc<ChatTemplate>>,
    /// What the model's authors recommend.
    pub defaults: SamplingDefaults,
}

/// A model with its measurements.
pub(crate) struct Model {
    pub(crate) served: ServedModel,
    pub(crate) metrics: ModelMetrics,
}

impl Model {
    /// The canonical name.
    pub(crate) fn name(&self) -> &str {
        self.served.names.first().map_or("", String::as_str)
    }
}

/// How far the shutdown has come.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Phase {
    /// Taking requests.
    Open,
    /// Finishing what runs, refusing what is new.
    Draining,
    /// What still runs is being cancelled.
    Closing,
}

/// The state behind the routes.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) keys: Keys,
    pub(crate) models: Vec<Arc<Model>>,
    pub(crate) bodies: BodyBudget,
    pub(crate) responses: Responses,
    /// Unix seconds.
    pub(crate) started: u64,
    pub(crate) phase: watch::Sender<Phase>,
    generations: Arc<Semaphore>,
    next_id: AtomicU64,
}

impl Shared {
    pub(crate) fn new(config: Config, models: Vec<ServedModel>) -> Shared {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let wrap = |served: ServedModel| {
            let metrics = ModelMetrics::new(served.replica.info().max_model_len);
            Arc::new(Model { served, metrics })
        };
        Shared {
            keys: Keys::new(&config.api_keys),
            models: models.into_iter().map(wrap).collect(),
            bodies: BodyBudget::new(&config.limits),
            responses: Responses::new(),
            started: since_epoch.as_secs(),
            phase: watch::Sender::new(Phase::Open),
            generations: Arc::new(Semaphore::new(config.limits.generations.max(1))),
            // Seeds are drawn from ids: another run shall not repeat this one's.
            next_id: AtomicU64::new(u64::from(since_epoch.subsec_nanos()) << 32),
            config,
        }
    }

    /// The model of that name. Without a name: the only model.
    pub(crate) fn model(&self, name: Option<&str>) -> Result<Arc<Model>, ApiError> {
        let Some(name) = name else {
            return match &self.models[..] {
                [model] => Ok(model.clone()),
                _ => Err(ApiError::field("model", format!("'model' must be {}", self.names()))),
            };
        };
        let known = self.models.iter().find(|model| model.served.names.iter().any(|n| n == name));
        known.cloned().ok_or_else(|| ApiError::UnknownModel {
            name: crate::fields::shortened(name),
            served: self.names(),
        })
    }

    /// Every name, for an error.
    fn names(&self) -> String {
        let names = self.models.iter().flat_map(|model| &model.served.names);
        let names: Vec<String> = names.map(|name| format!("'{name}'")).collect();
        names.join(" or ")
    }

    /// A name for the next request.
    pub(crate) fn request_id(&self) -> RequestId {
        RequestId(self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Room for one more request, held while it runs.
    pub(crate) fn admit(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        if *self.phase.borrow() != Phase::Open {
            let message = "the server is shutting down; send the request to another one";
            return Err(ApiError::Unavailable(message.to_owned()));
        }
        self.generations.clone().try_acquire_owned().map_err(|_| ApiError::Overloaded {
            message: format!(
                "{} requests are being served, the most this server takes; retry in \
                 {RETRY_AFTER_S} s",
                self.config.limits.generations
            ),
            retry_after_s: RETRY_AFTER_S,
        })
    }

    /// Waits until no request runs.
    pub(crate) async fn idle(&self) {
        let all = u32::try_from(self.config.limits.generations.max(1)).unwrap_or(u32::MAX);
        // The semaphore is never closed; if it were, nothing could run.
        let _ = self.generations.acquire_many(all).await;
    }
}

/// Seconds since 1970.
pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
