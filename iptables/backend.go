package iptables

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/coreos/go-iptables/iptables"

	"signalbox/proxier/plan"
)

// Backend is the variant of the iptables tools.
type Backend string

// The two variants. They do not see each other's rules, and a packet passes
// both.
const (
	Legacy Backend = "legacy"
	NFT    Backend = "nft"
)

// defaultWait bounds the wait for the lock.
const defaultWait = 5 * time.Second

// tools are the programs of one variant for one family.
type tools struct {
	backend                Backend
	family                 plan.Family
	command, restore, save string // paths
	wait                   time.Duration
	version                [3]int
}

func (t *tools) waitSeconds() string {
	return strconv.Itoa(max(1, int((t.wait+time.Second-1)/time.Second)))
}

func (t *tools) lockFile() string {
	if path := os.Getenv("XTABLES_LOCKFILE"); path != "" {
		return path
	}
	return "/run/xtables.lock"
}

func (t *tools) dropInvalid() bool {
	liberal, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal")
	return err != nil || strings.TrimSpace(string(liberal)) == "0"
}

// facts asks the kernel and the tools.
func (t *tools) facts() facts {
	return facts{
		dropInvalid: t.dropInvalid(),
		randomFully: slices.Compare(t.version[:], []int{1, 6, 2}) >= 0,
	}
}

// oldestVersion is the first whose iptables-restore waits for the lock.
var oldestVersion = [3]int{1, 6, 2}

func commandName(f plan.Family) string {
	if f == plan.IPv6 {
		return "ip6tables"
	}
	return "iptables"
}

func protocol(f plan.Family) iptables.Protocol {
	if f == plan.IPv6 {
		return iptables.ProtocolIPv6
	}
	return iptables.ProtocolIPv4
}

// findTools returns the programs of a variant: those named after it or, where
// a system has only one, those without a name that are it.
func findTools(f plan.Family, b Backend, wait time.Duration) (*tools, error) {
	base := commandName(f)
	var failed []error
	for _, name := range []string{base + "-" + string(b), base} {
		t := &tools{backend: b, family: f, wait: wait}
		if err := t.locate(name); err != nil {
			failed = append(failed, err)
			continue
		}
		is, err := t.variant()
		if err != nil {
			failed = append(failed, err)
			continue
		}
		if is == b {
			return t, nil
		}
		failed = append(failed, fmt.Errorf("%s is the %s variant", t.command, is))
	}
	return nil, errors.Join(failed...)
}

// noteworthy joins what findTools answered for both variants, once each and
// without that a program is not there, which needs no reason. What is there and
// does not work has one.
func noteworthy(found ...error) error {
	var texts []string
	for _, err := range found {
		for _, err := range err.(interface{ Unwrap() []error }).Unwrap() {
			if text := err.Error(); !errors.Is(err, exec.ErrNotFound) && !slices.Contains(texts, text) {
				texts = append(texts, text)
			}
		}
	}
	if len(texts) == 0 {
		return nil
	}
	return errors.New(strings.Join(texts, "; "))
}

func (t *tools) locate(name string) error {
	for path, program := range map[*string]string{&t.command: name, &t.restore: name + "-restore", &t.save: name + "-save"} {
		found, err := lookPath(program)
		if err != nil {
			return err
		}
		*path = found
	}
	return nil
}

// lookPath looks into the usual folders too: a service's PATH often lacks them.
func lookPath(program string) (string, error) {
	path, err := exec.LookPath(program)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path, lookErr := exec.LookPath(filepath.Join(dir, program)); lookErr == nil {
			return path, nil
		}
	}
	return "", err
}

// variant asks the command what it is, and notes its version.
func (t *tools) variant() (Backend, error) {
	client, err := t.client()
	if err != nil {
		return "", err
	}
	t.version[0], t.version[1], t.version[2] = client.GetIptablesVersion()
	out, err := exec.Command(t.command, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("%s --version: %w", t.command, err)
	}
	if bytes.Contains(out, []byte("nf_tables")) {
		return NFT, nil
	}
	return Legacy, nil
}

// client handles single rules and chains.
func (t *tools) client() (*iptables.IPTables, error) {
	seconds, _ := strconv.Atoi(t.waitSeconds())
	client, err := iptables.New(iptables.IPFamily(protocol(t.family)), iptables.Path(t.command), iptables.Timeout(seconds))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", t.command, err)
	}
	return client, nil
}

// chooseTools takes the variant that the kubelet of this node uses; without
// its hint the one that has more rules, because rules that other software
// wrote must be seen; and without any rules the system's own.
func chooseTools(ctx context.Context, f plan.Family, wait time.Duration) (t *tools, why string, err error) {
	nft, nftErr := findTools(f, NFT, wait)
	legacy, legacyErr := findTools(f, Legacy, wait)
	switch {
	case nftErr != nil && legacyErr != nil:
		return nil, "", missingTools(f, noteworthy(nftErr, legacyErr))
	case nftErr != nil:
		return legacy, "the only variant installed", nil
	case legacyErr != nil:
		return nft, "the only variant installed", nil
	}
	both := []*tools{nft, legacy}
	for _, hint := range []string{"KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"} {
		for _, t := range both {
			if t.hasChain(ctx, "mangle", hint) {
				return t, "the kubelet's chain " + hint, nil
			}
		}
	}
	switch n, l := nft.countRules(ctx), legacy.countRules(ctx); {
	case n > l:
		return nft, fmt.Sprintf("%d rules there, %d in the other", n, l), nil
	case l > n:
		return legacy, fmt.Sprintf("%d rules there, %d in the other", l, n), nil
	}
	for _, t := range both {
		system := *t
		if system.locate(commandName(f)) != nil {
			break
		}
		if is, err := system.variant(); err == nil && is == t.backend {
			return t, "the system's default", nil
		}
	}
	return nft, "nothing speaks for the other", nil
}

// tables are the tables that exist. To ask the legacy tools for another would
// make it, and load its module.
func (t *tools) tables() []string {
	if t.backend == NFT {
		return []string{"mangle", "nat", "filter"}
	}
	file, err := os.Open("/proc/thread-self/net/" + map[plan.Family]string{plan.IPv4: "ip", plan.IPv6: "ip6"}[t.family] + "_tables_names")
	if err != nil {
		return nil // the module is not there
	}
	defer file.Close()
	var names []string
	for lines := bufio.NewScanner(file); lines.Scan(); {
		names = append(names, lines.Text())
	}
	return names
}

func (t *tools) hasChain(ctx context.Context, table, name string) bool {
	if !slices.Contains(t.tables(), table) {
		return false
	}
	l, err := t.list(ctx, table)
	return err == nil && slices.Contains(l.chains, name)
}

func (t *tools) countRules(ctx context.Context) int {
	n := 0
	for _, name := range t.tables() {
		if l, err := t.list(ctx, name); err == nil {
			n += l.rules
		}
	}
	return n
}
