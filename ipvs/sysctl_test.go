// SPDX-License-Identifier: Apache-2.0

package ipvs

import (
	"errors"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"signalbox/node"

	"signalbox/proxier/conformance"
	"signalbox/proxier/plan"
)

// lockSysctls makes /proc/sys read-only for the test, as in an unprivileged container. unlock
// ends that.
func lockSysctls(t *testing.T) (unlock func()) {
	t.Helper()
	const path = "/proc/sys"
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	must(unix.Unshare(unix.CLONE_NEWNS)) // the thread, which nstest.Enter has locked, ends with the test
	must(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	must(unix.Mount(path, path, "", unix.MS_BIND, ""))
	must(unix.Mount("", path, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	return func() { must(unix.Unmount(path, unix.MNT_DETACH)) }
}

// TestServesWithoutSettings checks that a kernel setting that cannot be made is reported, and
// that Services are served.
func TestServesWithoutSettings(t *testing.T) {
	const name = "net/ipv4/ip_forward"
	k := newFakeIPVS(t)
	p := k.proxier(t, time.Now)
	if p := node.SetSysctl(name, "0", ""); p != nil {
		t.Fatal(p)
	}
	unlock := lockSysctls(t)
	plan := conformance.Fleet(plan.IPv4, 3, 2)
	syncAll(t, p, plan)
	if len(k.model.servers) != 3 {
		t.Errorf("%d virtual servers, not 3", len(k.model.servers))
	}
	problem := func() *node.KernelProblem {
		for _, p := range p.KernelProblems() {
			if strings.HasSuffix(p.File, name) {
				return p
			}
		}
		return nil
	}
	if p := problem(); p == nil || p.Wanted != "1" || p.Found != "0" || p.Impact == "" || !errors.Is(p, unix.EROFS) || !strings.Contains(p.Remedy(), "--init-only") {
		t.Errorf("the problem is %+v", p)
	}
	unlock()
	syncAll(t, p, plan)
	if p := problem(); p != nil {
		t.Errorf("it could be made, and there is %v", p)
	}
}
