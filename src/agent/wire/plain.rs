//! Requests and replies about plain images: what [`crate::plain::PlainTarget`] offers. Its digests and patches travel
//! as those of a replica's disk.

use crate::agent::wire::handle::Handle;
use crate::plain::tree::Make;
use crate::plain::{Committed, Finish, ImageView, Whole, Wish};
use serde::{Deserialize, Serialize};

/// Each is answered by the [`PlainReply`] of the same name.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlainRequest {
    /// Opens an image that the agent's host serves, or one that does not exist yet.
    Open {
        /// Path and format of the image, and how it may be changed.
        wish: Wish,
    },
    /// Reads the whole image for its root, unless kept digests already tell it.
    Read {
        /// Image to read.
        image: Handle,
    },
    /// Puts the patched content into the image's place. The result is durable when the agent answers.
    Commit {
        /// Image to put into place.
        image: Handle,
        /// Owner, mode and time that the file gets beside its content.
        finish: Finish,
    },
    /// A directory or a link beside the images.
    Make {
        /// Path, and whether a directory or a link is made there.
        make: Make,
    },
}

/// Answer to the `PlainRequest` of the same name.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlainReply {
    /// The handle is one of the same kind as a replica's: `nodes`, `pieces`, `Apply`, `finish_disk` and `Release` take
    /// it.
    Open {
        /// Handle of the image for the rest of the session.
        image: Handle,
        /// State of the image when it was opened.
        view: ImageView,
    },
    /// The image was read, or its root was known.
    Read {
        /// Size and root of the image, and the bytes that were read.
        whole: Whole,
    },
    /// The image is in its place.
    Commit {
        /// How the image was changed, and why its digests were not kept.
        committed: Committed,
    },
    /// The directory or link is there.
    Make {},
}
