// SPDX-License-Identifier: Apache-2.0

package syncer

import (
	"context"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"

	"signalbox/proxier"
	"signalbox/proxier/plan"
	"signalbox/proxier/service"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestPlans goes through testdata/plan. Each archive holds
//
//	settings   optional: what the operator decided and which addresses the
//	           node has, in YAML
//	objects    manifests that are applied, seen from the node "node1"
//	delete     optional, manifests that are deleted
//
// and what must follow from them: the plans "IPv4" and "IPv6" (the family that
// serves nothing may be left out) and "problems". More steps follow in files
// "objects 2", "delete 2", "IPv4 2" and so on.
func TestPlans(t *testing.T) {
	files, err := filepath.Glob("testdata/plan/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no archives: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) { runPlanArchive(t, file) })
	}
}

// operator is the file "settings".
type operator struct {
	MasqueradeAll         bool
	DetectLocal           service.DetectLocal
	ClusterCIDRs          []netip.Prefix
	Bridge                string
	InterfacePrefix       string
	NodePortsAt           []netip.Prefix
	NodePortsAtPrimary    bool
	NodeAddress           netip.Addr
	LocalhostNodePorts    service.LocalhostNodePorts
	IgnoreExternalIPs     bool
	HasSchedulers         bool
	KubeProxyIPVSPolicies bool
	LocalAddrs            []netip.Addr
	APIServers            []netip.AddrPort
}

func (o *operator) settings() service.Settings {
	return service.Settings{
		MasqueradeAll: o.MasqueradeAll, DetectLocal: o.DetectLocal, ClusterCIDRs: o.ClusterCIDRs,
		PodBridgeInterface: o.Bridge, PodInterfaceNamePrefix: o.InterfacePrefix,
		NodePortAddresses:  service.NodePortSelector{Primary: o.NodePortsAtPrimary, CIDRs: o.NodePortsAt},
		NodeAddress:        o.NodeAddress,
		LocalhostNodePorts: o.LocalhostNodePorts, IgnoreExternalIPs: o.IgnoreExternalIPs,
		HasSchedulers: o.HasSchedulers, KubeProxyIPVSPolicies: o.KubeProxyIPVSPolicies,
	}
}

func runPlanArchive(t *testing.T, file string) {
	archive, err := txtar.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	text := map[string]string{}
	for _, f := range archive.Files {
		text[f.Name] = string(f.Data)
	}
	op := operator{ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/48")}}
	decode(t, text["settings"], &op)

	var problems strings.Builder
	loop := NewLoop(LoopOptions{
		NodeName: "node1", Settings: op.settings(),
		Proxiers: map[plan.Family]proxier.Proxier{plan.IPv4: &fakeProxier{}, plan.IPv6: &fakeProxier{}},
		Report:   func(p plan.Problem) { problems.WriteString(p.String() + "\n") },
	})
	loop.SetLocalAddrs(op.LocalAddrs)
	loop.SetAPIServers(op.APIServers)
	loop.Synced()
	got := map[string]string{}
	for step := 1; step == 1 || text["objects"+suffix(step)] != "" || text["delete"+suffix(step)] != ""; step++ {
		for _, obj := range manifests(t, text["objects"+suffix(step)]) {
			loop.Apply(obj)
		}
		for _, obj := range manifests(t, text["delete"+suffix(step)]) {
			loop.Delete(obj)
		}
		if err := loop.SyncNow(context.Background()); err != nil {
			t.Fatal(err)
		}
		for _, family := range plan.Families {
			plan := loop.Plan(family)
			checkPlan(t, plan)
			checkReasons(t, loop, family)
			if _, wanted := text[family.String()+suffix(step)]; wanted || len(plan.Services) > 0 {
				got[family.String()+suffix(step)] = plan.String()
			}
		}
		if problems.Len() > 0 {
			got["problems"+suffix(step)] = problems.String()
			problems.Reset()
		}
	}
	compareArchive(t, file, archive, got)
}

func suffix(step int) string {
	if step == 1 {
		return ""
	}
	return " " + string(rune('0'+step))
}

// compareArchive compares the files of an archive that are results, or with
// -update replaces them, each behind the objects of its step.
func compareArchive(t *testing.T, file string, archive *txtar.Archive, got map[string]string) {
	t.Helper()
	isResult := func(name string) bool {
		word, _, _ := strings.Cut(name, " ")
		return word == "IPv4" || word == "IPv6" || word == "problems"
	}
	if *update {
		out := &txtar.Archive{Comment: archive.Comment}
		for i, f := range archive.Files {
			if isResult(f.Name) {
				continue
			}
			out.Files = append(out.Files, f)
			_, step, more := strings.Cut(f.Name, " ")
			if more {
				step = " " + step
			}
			if f.Name == "settings" || f.Name == "objects"+step && i+1 < len(archive.Files) && archive.Files[i+1].Name == "delete"+step {
				continue
			}
			for _, name := range []string{"IPv4", "IPv6", "problems"} {
				if text, ok := got[name+step]; ok {
					out.Files = append(out.Files, txtar.File{Name: name + step, Data: []byte(text)})
				}
			}
		}
		if err := os.WriteFile(file, txtar.Format(out), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	for _, f := range archive.Files {
		if !isResult(f.Name) {
			continue
		}
		if got[f.Name] != string(f.Data) {
			t.Errorf("%s is\n%s\nwant\n%s", f.Name, got[f.Name], f.Data)
		}
		delete(got, f.Name)
	}
	for name, text := range got {
		t.Errorf("%s is not expected:\n%s", name, text)
	}
}

// checkPlan checks what every plan promises.
func checkPlan(t testing.TB, desired *plan.Plan) {
	t.Helper()
	taken := map[plan.FrontendKey]plan.ServicePortName{}
	for name, sp := range desired.Services {
		if sp == nil || sp.Name != name || sp.Usable == nil {
			t.Fatalf("%s: broken entry %+v", name, sp)
		}
		checkSet(t, name, sp.Usable)
		for i := range sp.Frontends {
			f := &sp.Frontends[i]
			key := f.Key(name.Protocol)
			if other, twice := taken[key]; twice {
				t.Fatalf("%s and %s both have %s", name, other, key)
			}
			taken[key] = name
			if f.Port == 0 || (f.Kind == plan.NodePort) == f.Addr.IsValid() || f.Addr.IsValid() && plan.FamilyOf(f.Addr) != desired.Family {
				t.Fatalf("%s: broken frontend %+v", name, f)
			}
			if f.Internal == nil || f.External == nil {
				t.Fatalf("%s: %s has no set", name, key)
			}
			checkSet(t, name, f.Internal)
			checkSet(t, name, f.External)
		}
	}
}

// checkReasons checks that each endpoint of a plan has a reason to be in its set, and
// each other endpoint one to be left out.
func checkReasons(t testing.TB, loop *Loop, family plan.Family) {
	t.Helper()
	for name, sp := range loop.Plan(family).Services {
		why := loop.Service(family, name.ServiceName).Reasons[name]
		for i := range sp.Frontends {
			f := &sp.Frontends[i]
			for from, set := range map[plan.TrafficSources]*plan.EndpointSet{plan.FromPods: f.Internal, plan.FromOutside: f.External} {
				used := 0
				for _, e := range why.Endpoints(why.Scope(f.Kind, from)) {
					takesPart := e.Reason == plan.Ready || e.Reason == plan.Terminating
					if takesPart != set.Contains(e.Addr) || e.Reason.Text() == "" {
						t.Fatalf("%s: %s has the reason %s, and %s goes to %s", name, e.Addr, e.Reason, f.Key(name.Protocol), set)
					}
					if takesPart {
						used++
					}
				}
				if used != set.Len() {
					t.Fatalf("%s: %d endpoints have a reason to be in %s", name, used, set)
				}
			}
		}
	}
}

func checkSet(t testing.TB, name plan.ServicePortName, s *plan.EndpointSet) {
	t.Helper()
	for i := 1; i < len(s.Endpoints); i++ {
		if s.Endpoints[i-1].AddrPort.Compare(s.Endpoints[i].AddrPort) >= 0 {
			t.Fatalf("%s: endpoints out of order or twice: %s", name, s)
		}
	}
}
