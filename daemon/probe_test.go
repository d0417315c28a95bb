// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"signalbox/internal/netlab"
)

// probe asks URLs without a pause, each on a connection that it keeps and on new
// ones. end stops it and says how often it asked and what was not a 200.
func probe(t *testing.T, from *netlab.Host, urls ...string) (end func() (asked int, failed []error)) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var mu sync.Mutex
	var asked int
	var failed []error
	var work sync.WaitGroup
	for _, url := range urls {
		for _, keep := range []bool{true, false} {
			client := from.Client()
			client.Transport.(*http.Transport).DisableKeepAlives = !keep
			work.Go(func() {
				defer client.CloseIdleConnections()
				for ctx.Err() == nil {
					err := probeOnce(ctx, client, url)
					if ctx.Err() != nil {
						return
					}
					mu.Lock()
					asked++
					if err != nil {
						failed = append(failed, err)
					}
					mu.Unlock()
				}
			})
		}
	}
	return sync.OnceValues(func() (int, []error) {
		cancel()
		work.Wait()
		return asked, failed
	})
}

func probeOnce(ctx context.Context, client *http.Client, url string) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %d: %s", url, resp.StatusCode, body)
	}
	return err
}

// counters are all counters that a process exposes, and of histograms how often
// they were told something.
func counters(t *testing.T, on *netlab.Host) map[string]float64 {
	t.Helper()
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(page(on, "http://127.0.0.1:10249/metrics")))
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]float64{}
	for name, f := range families {
		for _, m := range f.Metric {
			key := name + fmt.Sprint(m.Label)
			switch f.GetType() {
			case dto.MetricType_COUNTER:
				all[key] = m.GetCounter().GetValue()
			case dto.MetricType_HISTOGRAM:
				all[key] = float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return all
}

// Who asks for health, and who reads counters, does not see that the
// configuration changes.
func TestChangesAreNotSeenByProbes(t *testing.T) {
	node := newNode(t)
	source, mounted := manifests(t), mountConfiguration(t)
	if err := os.WriteFile(filepath.Join(source, "balanced.yaml"), []byte(balancedManifest), 0o600); err != nil {
		t.Fatal(err)
	}
	const fixed = "conntrack: {maxPerCore: 0}\nnodePortAddresses: [0.0.0.0/0]\n"
	mounted.write(fixed + "mode: nftables\n")
	log := start(t, node, build(t), "--config", mounted.path(), "--source", source)
	const healthz, check = "http://127.0.0.1:10256/healthz", "http://127.0.0.1:31900/"
	eventually(t, "it serves", func() bool {
		return strings.Contains(page(node, check), `"localEndpoints": 1`) && strings.Contains(page(node, healthz), `"IPv6"`)
	})
	end := probe(t, node, healthz, check, "http://127.0.0.1:10249/proxyMode")
	before := counters(t, node)
	for i, change := range []string{
		"mode: nftables\nnftables: {masqueradeAll: true}\n", "mode: iptables\n", "mode: userspace\n", "mode: nftables\nlogging: {verbosity: 1}\n",
	} {
		mounted.write(fixed + change)
		eventually(t, "the change takes effect", func() bool {
			return log.count("level=INFO msg=synced family=IPv4") == i+2 && log.count("level=INFO msg=synced family=IPv6") == i+2
		})
		now := counters(t, node)
		for name, n := range before {
			// A mode's own are not there in another one.
			if got, ok := now[name]; ok && got < n {
				t.Errorf("%s fell from %v to %v with %q", name, n, got, change)
			}
		}
		maps.Copy(before, now)
	}
	if n := before["kubeproxy_sync_proxy_rules_service_changes_total[]"]; n < 10 {
		t.Errorf("%v changes of 2 Services were told of to 5 configurations", n)
	}
	asked, failed := end()
	t.Logf("%d probes during 4 changes", asked)
	if len(failed) > 0 {
		t.Errorf("of %d probes %d were not answered with 200: %v", asked, len(failed), errors.Join(failed[:min(5, len(failed))]...))
	}
	if n := log.count("msg=listening"); n != 2 {
		t.Errorf("it listened %d times, for two servers", n)
	}
}

// A port is closed where the changed file says another address, and only there.
func TestPortsThatChange(t *testing.T) {
	t.Parallel()
	node := newNode(t)
	mounted := mountConfiguration(t)
	const fixed = "conntrack: {maxPerCore: 0}\nmode: nftables\n"
	mounted.write(fixed)
	log := start(t, node, build(t), "--config", mounted.path(), "--source", manifests(t))
	const was, is, kept = "http://127.0.0.1:10256/livez", "http://127.0.0.1:10266/livez", "http://127.0.0.1:10249/proxyMode"
	eventually(t, "health is answered", func() bool { return page(node, was) != "" && page(node, kept) != "" })
	end := probe(t, node, kept)
	mounted.write(fixed + "healthzBindAddress: 0.0.0.0:10266\n")
	eventually(t, "health is answered elsewhere", func() bool { return page(node, is) != "" && page(node, was) == "" })

	// What cannot listen there is not put into force, and what was is again.
	taken, err := node.Listen("tcp", "0.0.0.0:10276")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	mounted.write(fixed + "healthzBindAddress: 0.0.0.0:10276\nbindAddressHardFail: true\n")
	eventually(t, "it goes back", func() bool { return log.count("signalbox returned to the previous one") == 1 })
	eventually(t, "health is answered as before", func() bool { return page(node, is) != "" })
	mounted.write(fixed + "healthzBindAddress: \"0\"\n")
	eventually(t, "health is not answered any more", func() bool { return page(node, is) == "" })
	if asked, failed := end(); len(failed) > 0 {
		t.Errorf("of %d probes elsewhere %d were not answered with 200: %v", asked, len(failed), failed[0])
	}
}
