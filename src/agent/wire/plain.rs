//! Requests and replies about plain images: what [`crate::plain::PlainTarget`] offers. Its digests and patches travel as those of
//! a replica's disk.

use crate::agent::wire::handle::Handle;
use crate::plain::tree::Make;
use crate::plain::{Committed, Finish, ImageView, Whole, Wish};
use serde::{Deserialize, Serialize};

/// Each is answered by the [`Told`] of the same name.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    Open {
        wish: Wish,
    },
    Read {
        image: Handle,
    },
    Commit {
        image: Handle,
        finish: Finish,
    },
    /// A directory or a link beside the images.
    Make {
        make: Make,
    },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Told {
    /// The handle is one of the same kind as a replica's: `nodes`, `pieces`, `Apply`, `finish_disk` and `Release` take it.
    Open {
        image: Handle,
        view: ImageView,
    },
    Read {
        whole: Whole,
    },
    Commit {
        committed: Committed,
    },
    Make {},
}
