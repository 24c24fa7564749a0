//! What to do next, in the words of this program: the one place that turns an [`Advice`] into sentences with commands.
//!
//! Names that the error knows stand in the command; capitals stand for the rest (DOMAIN, TARGET, POINT). A test reads
//! every command below with the program's own grammar.

use std::borrow::Cow;
use virt_replica::error::advice::{
    Advice, Failover, Handover, Host, Image, Overlay, Repair, Run, Store, TakeOver, Way,
};
use virt_replica::error::{Context, Error};
use virt_replica::recovery::bringup::Readiness;

/// The next step, as a person reads it.
pub fn words(advice: &Advice, about: &Context) -> String {
    let domain = about.domain.as_deref().map_or(Cow::Borrowed("DOMAIN"), quoted);
    match advice {
        Advice::Text(text) => text.to_string(),
        Advice::Run(run) => of_run(*run, &domain),
        Advice::Overlay(overlay) => of_overlay(*overlay).to_owned(),
        Advice::Repair(repair) => of_repair(*repair, &domain),
        Advice::TakeOver(take_over) => of_take_over(*take_over, &domain),
        Advice::Store(store) => of_store(store, &domain, about),
        Advice::Failover(failover) => of_failover(*failover, &domain),
        Advice::Handover(handover) => of_handover(handover, &domain),
        Advice::Image(image) => of_image(image),
        Advice::Host(host) => of_host(host, &domain),
    }
}

/// The next step after this error, if it has one.
pub fn of(error: &Error) -> Option<String> {
    error.next_step(words)
}

/// What a host says about bringing a domain up, with every advice in words.
pub fn said(readiness: Readiness) -> Readiness {
    let mut said = readiness.spoken(Some(words));
    said.findings.iter_mut().for_each(|finding| finding.advised = None);
    said
}

/// A name as a shell takes it.
fn quoted(name: &str) -> Cow<'_, str> {
    let plain = |c: char| c.is_alphanumeric() || "._-:/@%+,=".contains(c);
    match !name.is_empty() && name.chars().all(plain) {
        true => Cow::Borrowed(name),
        false => Cow::Owned(format!("'{}'", name.replace('\'', r"'\''"))),
    }
}

fn of_run(run: Run, domain: &str) -> String {
    match run {
        Run::FirstPoint => format!("`virt-replica sync {domain} --to TARGET` makes the first point"),
        Run::NewPoint => format!("make a new point: `virt-replica sync {domain} --to TARGET`"),
        Run::ExcludeDisk => "repair the image, or exclude the disk with --exclude-disk".to_owned(),
        Run::DefineDisk => format!(
            "put it into the definition (`virsh attach-disk {domain} FILE DISK --config`), detach it, or leave it behind \
             with --exclude-disk"
        ),
        Run::InstallGuestAgent => "install and start qemu-guest-agent in the guest, and give the domain its channel \
                                   (org.qemu.guest_agent.0). To go on without it: --quiesce try"
            .to_owned(),
        Run::WithoutGuestAgent => {
            "check the guest agent in the guest, or let the run go on without it: --quiesce try".to_owned()
        }
    }
}

fn of_overlay(overlay: Overlay) -> &'static str {
    match overlay {
        Overlay::MakeRoom => {
            "free space there, choose another directory with --overlay-dir, or keep less free with --min-free-source"
        }
        Overlay::NeedsDirectory => {
            "overlays of block devices need a directory with room: create it, or choose one with --overlay-dir"
        }
        Overlay::AnotherDirectory => "choose another directory with --overlay-dir",
        Overlay::AnotherFileSystem => "choose a directory on another file system with --overlay-dir, or a shorter path",
        Overlay::LargerFileSystem => {
            "free space there, choose a larger file system with --overlay-dir, or run when the guest writes less"
        }
        Overlay::AllowMoreBytes => {
            "allow more (`overlay: max_bytes` in a policy, --overlay-max-bytes), or run when the guest writes less"
        }
        Overlay::AllowMoreTime => {
            "the next run keeps what a first copy has sent, and goes on there. Allow more time (`overlay: max_age` in a \
             policy, --overlay-max-age), or use a faster link"
        }
        Overlay::GuestStopped => {
            "give overlays more room: another directory (--overlay-dir), or more free space (--min-free-source)"
        }
    }
}

fn of_repair(repair: Repair, domain: &str) -> String {
    let then = format!("`virt-replica doctor {domain} --repair`");
    match repair {
        Repair::Explain => format!("`virt-replica doctor {domain}` says what was found and what to do"),
        Repair::ExplainLeftovers => format!("`virt-replica doctor {domain}` says what was left behind"),
        Repair::StartSaved => format!(
            "start the domain (`virsh start {domain}`), so that it resumes from the saved image. Then run {then}"
        ),
        Repair::EndBlockJob => {
            format!("let it finish, or end it (`virsh blockjob {domain} DISK --info`). Then run {then}")
        }
        Repair::CompareWithRecord => format!(
            "keep both files. Compare `virsh domblklist {domain}`, with and without `--inactive`, with the record that \
             `virt-replica doctor {domain}` shows"
        ),
        Repair::PlugIn => {
            format!(
                "plug the disk in again with the overlay as its source and run {then}, or commit the overlay by hand"
            )
        }
        Repair::Start => format!(
            "start the domain, then run {then}: only a running domain can commit a middle layer of its chain safely"
        ),
        Repair::OnOtherHost => format!("run {then} on the host that has the domain now"),
        Repair::ShutOff => format!(
            "shut the guest off when it suits you. Then run {then}, or wait for the next run. Until then the guest writes \
             to the overlay, and nothing is lost"
        ),
        Repair::ShutDown => format!(
            "shut the domain down when it suits you, then run {then}. Its definition names the overlay until then, and \
             nothing is lost"
        ),
        Repair::CheckRights => format!(
            "QEMU may not write to the disk's own image. Compare its owner, mode and label with those of the domain's \
             other images, then run {then}"
        ),
    }
}

fn of_take_over(take_over: TakeOver, domain: &str) -> String {
    let command = format!("`virt-replica sync {domain} --to TARGET --take-over`");
    match take_over {
        TakeOver::IfThisSideCounts => {
            format!("decide which side has the data that counts. If this source is the right one, run once: {command}")
        }
        TakeOver::IfMovedHere => format!(
            "the replica was failed over, or follows another host now. Decide which side is right. If the domain has moved \
             to this host, run once: {command}"
        ),
        TakeOver::IfNoClone => format!(
            "if the domain is a clone, give it a UUID of its own. If it has moved to this host for good, run once: {command}"
        ),
        TakeOver::IfStateWasLost => format!(
            "this is the same host with another state directory. If the old one is lost or was moved, run once: {command}"
        ),
    }
}

fn of_store(store: &Store, domain: &str, about: &Context) -> String {
    let point = about.point.as_deref().unwrap_or("POINT");
    match store {
        Store::ListPoints { root } => {
            let target = root.as_deref().map_or(Cow::Borrowed("TARGET"), quoted);
            format!("`virt-replica points {domain} --to {target}` lists them")
        }
        Store::VerifyTarget => format!(
            "nothing was sealed. Check the target's storage, and run `virt-replica verify {domain} --to ROOT` there"
        ),
        Store::VerifyPoint => {
            format!("`virt-replica verify {domain} --to TARGET --point {point}` says what is damaged")
        }
        Store::VerifyAndSendAnew => format!(
            "`virt-replica verify {domain} --to TARGET --point {point}` says which blocks are damaged. Replicate the disk again"
        ),
        Store::VerifyUnchanged => format!(
            "nothing was changed. `virt-replica verify {domain} --to TARGET --point {point}` says whether a point is damaged"
        ),
        Store::ScrubAnew => format!("`virt-replica scrub {domain} --to TARGET --restart` begins a new one"),
        Store::SetGeneration => format!(
            "if that is wrong, the operator of the target corrects it: `virt-replica set-generation {domain} GENERATION`"
        ),
        Store::SetGenerationHere => format!(
            "only its generations are wrong: `virt-replica set-generation {domain} GENERATION` on this host corrects them"
        ),
        Store::SetGenerationThere => format!(
            "the other host has a wrong generation. Its operator corrects it: `virt-replica set-generation {domain} \
             GENERATION`"
        ),
        Store::UnpinThere => format!(
            "on the target's host: `virt-replica unpin {domain} {point} --to ROOT`, with the directory of its store"
        ),
        Store::LowerMinAge => "wait, or let the target's administrator lower --min-age of its agent".to_owned(),
        Store::Prune => {
            format!("remove points: `virt-replica prune {domain} --to TARGET --keep RULES`, or --keep in every run")
        }
        Store::WritePointAnew => format!(
            "nothing was changed. Write the point again: `virt-replica diff --point {domain} --to TARGET --output FILE`"
        ),
        Store::BringPointsBetween => format!(
            "apply the points between first, or one that starts from the newest point here: `virt-replica diff --point \
             {domain} --since POINT --to TARGET --output FILE`"
        ),
        Store::Create { root } => format!(
            "check the path, and whether its file system is mounted. To create a store there: `virt-replica store init {}` \
             on its host, or sync --create-store at the source",
            quoted(root)
        ),
        Store::Lost { root } => format!(
            "check whether its file system is mounted. If that store is lost, `virt-replica store init {}` on its host \
             creates another",
            quoted(root)
        ),
        Store::RightStore => "this command runs on the target, where the store is. Check --root".to_owned(),
    }
}

fn of_failover(failover: Failover, domain: &str) -> String {
    match failover {
        Failover::AskReady => format!("`virt-replica ready {domain}` says what to do about each"),
        Failover::AskElement => {
            format!("write it as `virt-replica ready {domain} --suggest` prints it, for example `devices/watchdog`")
        }
        Failover::LeaveOffOrUndo => format!(
            "leave the domain here shut off. If the one on the target is not needed, `virt-replica failover {domain} \
             --undo --lose-its-writes` there ends it, throws its writes away, and lets runs in again"
        ),
        Failover::FinishFailback => {
            format!("finish it first: `virt-replica failback {domain} --to HOME --home-loses`")
        }
        Failover::Commit => format!("commit it first: `virt-replica failover {domain} --commit`"),
        Failover::FinishUndo => {
            format!("finish that first: `virt-replica failover {domain} --undo --lose-its-writes`")
        }
        Failover::UndoOrHead => "undo that failover first, or leave --point out".to_owned(),
        Failover::BeginAnew => format!("begin again: `virt-replica failover {domain} --to TARGET`"),
        Failover::DetachFirst => {
            format!("give the domain images of its own first: `virt-replica detach {domain}` on this host")
        }
        Failover::DetachAgain => format!("`virt-replica detach {domain}` goes on where it stopped"),
        Failover::DetachAfterLook => format!(
            "libvirt's log says why. Check the free space, then run `virt-replica detach {domain}` again: it goes on where \
             it stopped"
        ),
        Failover::FinishDetach => {
            format!("finish that first, as the images may be a mixture now: `virt-replica detach {domain}`")
        }
        Failover::DetachSameFormat => {
            format!("finish that first: `virt-replica detach {domain}`, without --disk-format")
        }
        Failover::GiveWay => format!(
            "it is this domain, older or newer. If the domain lives elsewhere now, `virt-replica give-way {domain} \
             --lives-elsewhere` here keeps its data as a point"
        ),
        Failover::GiveWayByUuid => "two domains of one UUID cannot be on one host. If this is an older copy, \
                                    `virt-replica give-way UUID --lives-elsewhere` here keeps its data as a point"
            .to_owned(),
        Failover::ShortenChain => format!(
            "`virt-replica sync {domain} --to TARGET` shortens the chain of the newest point once it is too long. The \
             agent on this host sets the limit: --max-depth"
        ),
        Failover::UpdateTpmAndDrill => format!(
            "install at least the source's versions of swtpm and libtpms here, then try it: `virt-replica drill {domain} \
             --probe agent`"
        ),
        Failover::AlikeFirmwareAndDrill => format!(
            "keep the packages of the firmware alike on both hosts, and try the newest point: `virt-replica drill {domain} \
             --probe agent`"
        ),
        Failover::Drill => {
            format!("the guest has to do without it. Try it: `virt-replica drill {domain} --probe agent`")
        }
        Failover::OlderPoint => format!(
            "`virt-replica verify {domain} --to ROOT --point POINT` says whether an older point is whole. Take the newest that \
             is: --point"
        ),
        Failover::MapNetwork => of_map_network(domain),
    }
}

fn of_map_network(domain: &str) -> String {
    format!(
        "write under `networks:` in recovery.yaml what that is here: one of libvirt's networks, `bridge:NAME`, or `none`. \
         `virt-replica ready {domain} --suggest` prints the lines"
    )
}

fn of_handover(handover: &Handover, domain: &str) -> String {
    let command = |domain: &str, to: &str| format!("virt-replica failover {} --to {}", quoted(domain), quoted(to));
    match handover {
        Handover::ResumeOrForceOff => {
            format!("let it run (`virsh resume {domain}`), or end it as by a power cut: --force-off")
        }
        Handover::WaitOrForceOff => {
            "the guest was left to run, and may still shut down by itself. Look what keeps it, give \
                                     it longer (--timeout), or end it as by a power cut (--force-off)"
                .to_owned()
        }
        Handover::ShutOffHere { domain, to } => format!(
            "shut it off here (`virsh destroy {}`): the one on {to} is the domain. If that one is not wanted: `{} --abort`",
            quoted(domain),
            command(domain, to)
        ),
        Handover::LivesThere { domain, to } => format!(
            "leave it shut off here. `virt-replica failback {} --to HOME --home-loses` there brings it home. If it is not \
             wanted there: `{} --abort`",
            quoted(domain),
            command(domain, to)
        ),
        Handover::AskAgain { domain, to } => {
            format!("leave it shut off here; `{}` asks again and goes on", command(domain, to))
        }
        Handover::AskAgainOrAbort { domain, to } => format!(
            "leave the domain off here; `{}` asks again and goes on. With --abort the target calls it off, and then the \
             domain is started here",
            command(domain, to)
        ),
        Handover::Abort { domain, to } => format!("`{} --abort` goes on with that", command(domain, to)),
        Handover::GoOnOrAbort { domain, to } => format!(
            "`{}` goes on with it. With --abort it puts the domain back as it was, and so does `virt-replica doctor {} \
             --repair`",
            command(domain, to),
            quoted(domain)
        ),
        Handover::BringHomeOrLose => "replicate it home from there, with all it wrote. To call it off all the same: \
                                      --abort --lose-its-writes"
            .to_owned(),
        Handover::Converge => {
            "let the guest write less, use a faster link, or allow more (--max-downtime, --rounds-max). \
                               To move it whatever it takes: --now, or --at a quiet hour"
                .to_owned()
        }
    }
}

fn of_image(image: &Image) -> String {
    match image {
        Image::AllowBacking { dir } => {
            format!("if the image may read there, allow it: --backing {}", quoted(dir))
        }
        Image::Overwrite => "the image is there already: --force replaces it".to_owned(),
        Image::OtherNameOrOverwrite => "choose another name, or add --force".to_owned(),
        Image::PatchesBetween => "apply the patches between first, or make one against this image: `virt-replica diff \
                                  --base IMAGE --output PATCH SOURCE`"
            .to_owned(),
        Image::FinishChange => "`virt-replica apply --finish IMAGE` finishes it. So does the same copy or apply again".to_owned(),
        Image::PutBackAndFinish => "put the file that it names back and run `virt-replica apply --finish IMAGE` on it: \
                                    nothing else can mend that file. If a whole image was put here since, move the redo \
                                    file to another directory and keep it until the image was checked"
            .to_owned(),
        Image::InPlaceNeedsNoRoom => {
            "it takes as much room as the patch; --in-place needs none, and protects nothing".to_owned()
        }
        Image::ReadStill => "read an image that stands still: a snapshot, or one that nobody uses. --force-share accepts \
                             what comes"
            .to_owned(),
        Image::InUse => "`fuser -v FILE` names it. `virt-replica sync DOMAIN --to TARGET` replicates a running domain; \
                         --force-share reads the image as it is, torn"
            .to_owned(),
        Image::WriteRaw => "write raw contents to the device: --format raw".to_owned(),
        Image::ChooseWay { ways } => of_ways(ways),
        Image::MakeFiles => {
            "give that user the right, run it as another one, or use --in-place on an image that is there".to_owned()
        }
        Image::SayBlockSize => "say how large a block is: --changed-block".to_owned(),
        Image::NameSignature => "name the file that has it: --signature FILE".to_owned(),
        Image::NameIdentity => "name the file with your key: --decrypt-with FILE".to_owned(),
        Image::NameSignPassword => "name the file that has it: --sign-password-file FILE. `minisign -G -W` makes a key \
                                    without one"
            .to_owned(),
        Image::DecryptInPipe { key_file: true } => {
            "decrypt it in a pipe: age -d -i KEYFILE FILE | virt-replica ... -".to_owned()
        }
        Image::DecryptInPipe { key_file: false } => "decrypt it in a pipe: age -d FILE | virt-replica ... -".to_owned(),
    }
}

fn of_ways(ways: &[Way]) -> String {
    let options = ways.iter().filter_map(|way| match way {
        Way::Redo => Some("--atomic redo"),
        Way::Copy => Some("--atomic copy"),
        Way::InPlace => Some("--in-place"),
        Way::Auto => None,
    });
    let named = options.collect::<Vec<_>>().join(" or ");
    match (named.is_empty(), ways.contains(&Way::Auto)) {
        (false, true) => format!("use {named}, or let --atomic auto choose"),
        (false, false) => format!("use {named}"),
        (true, _) => "let --atomic auto choose".to_owned(),
    }
}

fn of_host(host: &Host, domain: &str) -> String {
    match host {
        Host::FindDomain => "`virsh list --all` shows the domains; -c URI asks another libvirt".to_owned(),
        Host::RunOn { host } => format!(
            "run virt-replica on {host}. If you did not name that URI, it comes from LIBVIRT_DEFAULT_URI or from \
             uri_default in libvirt.conf; -c qemu:///system means this host"
        ),
        Host::StateDir => {
            "run it as root (sudo), or name a directory of your own for the state: --state-dir DIR".to_owned()
        }
        Host::AskDaemon => format!(
            "`virt-replica policy run {domain}` asks it for a run; `virt-replica policy status` says what it does"
        ),
        Host::PolicySchema => {
            "`virt-replica policy schema` and docs/policies.md say what a policy consists of".to_owned()
        }
        Host::ServeImages => "its host has to allow `virt-replica agent --images --root DIR`".to_owned(),
        Host::ServeFailovers => "its host has to allow `virt-replica agent --failover --root DIR`".to_owned(),
        Host::ServedRoot => "--root of that host's agent says which directory it serves".to_owned(),
    }
}

#[cfg(test)]
#[path = "advice_tests.rs"]
mod tests;
