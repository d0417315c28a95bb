// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"bytes"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"signalbox/internal/netlab"
)

// apiServer is as much of an API server as it takes to serve one Service on
// node1 and to take Events.
type apiServer struct {
	rejections atomic.Int32 // Events that say that a configuration is not in force
	// token is the only one that is accepted; nil accepts everybody.
	token   atomic.Pointer[string]
	refused atomic.Int32
	watches atomic.Int32 // that were accepted
}

var apiLists = map[string]string{
	"services": `{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"1"},"items":[
		{"metadata":{"namespace":"default","name":"balanced"},"spec":{"type":"LoadBalancer","clusterIP":"10.96.0.20","clusterIPs":["10.96.0.20"],
		"externalTrafficPolicy":"Local","healthCheckNodePort":31900,"ports":[{"name":"http","port":80,"nodePort":30080}]}}]}`,
	"endpointslices": `{"kind":"EndpointSliceList","apiVersion":"discovery.k8s.io/v1","metadata":{"resourceVersion":"1"},"items":[
		{"metadata":{"namespace":"default","name":"balanced-1","labels":{"kubernetes.io/service-name":"balanced"}},"addressType":"IPv4",
		"ports":[{"name":"http","port":8080}],"endpoints":[{"addresses":["10.244.1.5"],"nodeName":"node1"}]}]}`,
	"nodes":        `{"kind":"NodeList","apiVersion":"v1","metadata":{"resourceVersion":"1"},"items":[{"metadata":{"name":"node1"}}]}`,
	"servicecidrs": `{"kind":"ServiceCIDRList","apiVersion":"networking.k8s.io/v1","metadata":{"resourceVersion":"1"},"items":[]}`,
}

func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if token := a.token.Load(); token != nil && r.Header.Get("Authorization") != "Bearer "+*token {
		a.refused.Add(1)
		w.WriteHeader(http.StatusUnauthorized)
		_, _ = io.WriteString(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Unauthorized","code":401}`)
		return
	}
	if r.Method == http.MethodPost {
		body, _ := io.ReadAll(r.Body)
		if bytes.Contains(body, []byte("ConfigurationRejected")) {
			a.rejections.Add(1)
		}
		w.Header().Set("Content-Type", r.Header.Get("Content-Type"))
		w.WriteHeader(http.StatusCreated)
		_, _ = w.Write(body)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if r.Method == http.MethodPatch {
		_, _ = io.WriteString(w, `{"kind":"Event","apiVersion":"events.k8s.io/v1"}`)
		return
	}
	switch q := r.URL.Query(); {
	case q.Get("sendInitialEvents") != "":
		w.WriteHeader(http.StatusBadRequest)
		_, _ = io.WriteString(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"BadRequest","code":400}`)
	case q.Get("watch") != "":
		a.watches.Add(1)
		w.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	default:
		_, _ = io.WriteString(w, apiLists[filepath.Base(r.URL.Path)])
	}
}

// at has it listen on a host until the test ends.
func (a *apiServer) at(t *testing.T, on *netlab.Host, addr string) {
	t.Helper()
	l, err := on.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: a}
	go func() {
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	}()
	t.Cleanup(func() { s.Close() })
}

// securelyAt is at with TLS, without which a client does not send its token. It returns the
// certificate that clients must trust, for a kubeconfig.
func (a *apiServer) securelyAt(t *testing.T, on *netlab.Host, addr string) (ca string) {
	t.Helper()
	l, err := on.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(a)
	s.Listener.Close()
	s.Listener = l
	s.StartTLS()
	t.Cleanup(s.Close)
	return base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
}

// A changed file that names an API server that does not answer costs nothing
// that works: the one before goes on to be obeyed, and log, metrics, health and
// an Event say so. As soon as it answers, or the file is corrected, that counts;
// the probes see nothing of it all.
func TestUnreachableAPIServer(t *testing.T) {
	t.Parallel()
	node := newNode(t)
	var first, second apiServer
	first.at(t, node, "127.0.0.1:6443")
	mounted := mountConfiguration(t)
	const fixed = "conntrack: {maxPerCore: 0}\nmode: nftables\nnodePortAddresses: [0.0.0.0/0]\nclientConnection: {kubeconfig: "
	file := func(port string) string {
		path := filepath.Join(t.TempDir(), "kubeconfig")
		text := strings.Replace(deadServer, "127.0.0.1:1", "127.0.0.1:"+port, 1)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return fixed + path + "}\n"
	}
	good, away := file("6443"), file("6444")
	mounted.write(good)
	log := start(t, node, build(t), "--config", mounted.path())
	const healthz, check = "http://127.0.0.1:10256/healthz", "http://127.0.0.1:31900/"
	eventually(t, "it serves", func() bool {
		return log.count("level=INFO msg=synced") == 2 && strings.Contains(page(node, check), `"localEndpoints": 1`) && strings.Contains(page(node, healthz), `"nodeEligible":true,"healthy":true`)
	})
	end := probe(t, node, healthz, check)

	rejected := func(yes bool) {
		t.Helper()
		eventually(t, fmt.Sprintf("the change is rejected: %v", yes), func() bool {
			return strings.Contains(page(node, healthz), "configurationRejected") == yes &&
				strings.Contains(page(node, "http://127.0.0.1:10249/metrics"), "\nsignalbox_configuration_rejected "+map[bool]string{true: "1", false: "0"}[yes]+"\n")
		})
	}
	mounted.write(away)
	rejected(true)
	eventually(t, "an Event says so", func() bool { return first.rejections.Load() == 1 })
	if body := page(node, healthz); !strings.Contains(body, "nothing listens at its address") {
		t.Errorf("/healthz does not say what is wrong: %s", body)
	}
	if n := log.count("cannot be served; the previous one stays in force"); n != 1 {
		t.Errorf("it is logged %d times", n)
	}
	// What was in force is what the file says again.
	mounted.write(good)
	rejected(false)
	if n := log.count("msg=starting"); n != 1 {
		t.Errorf("it started %d times for a configuration that was never out of force", n)
	}
	// It is corrected in another way.
	mounted.write(away)
	rejected(true)
	mounted.write(good + "nftables: {masqueradeAll: true}\n")
	rejected(false)
	eventually(t, "the corrected file takes effect", func() bool { return log.count("level=INFO msg=synced family=IPv4") == 2 })
	// The API server comes.
	mounted.write(away)
	rejected(true)
	second.at(t, node, "127.0.0.1:6444")
	rejected(false)
	eventually(t, "the change takes effect", func() bool { return log.count("level=INFO msg=synced family=IPv4") == 3 })
	if asked, failed := end(); len(failed) > 0 {
		t.Errorf("of %d probes %d were not answered with 200: %v", asked, len(failed), errors.Join(failed[:min(5, len(failed))]...))
	}
}

// TestKubeconfigIsReadAgain: the token in a kubeconfig is replaced. A wrong one changes
// nothing. The right one takes effect without a restart, and probes notice nothing.
func TestKubeconfigIsReadAgain(t *testing.T) {
	t.Parallel()
	node := newNode(t)
	var api apiServer
	api.token.Store(new("first"))
	ca := api.securelyAt(t, node, "127.0.0.1:6443")
	path := filepath.Join(t.TempDir(), "kubeconfig")
	write := func(token string) {
		t.Helper()
		text := strings.NewReplacer(`"http://127.0.0.1:1"`, `"https://127.0.0.1:6443", certificate-authority-data: `+ca, "user: {}", "user: {token: "+token+"}").Replace(deadServer)
		if err := errors.Join(os.WriteFile(path+".new", []byte(text), 0o600), os.Rename(path+".new", path)); err != nil {
			t.Fatal(err)
		}
	}
	write("first")
	log := start(t, node, build(t), "--kubeconfig", path, "--mode=nftables", "--hostname-override=node1", "--cluster-cidr=10.244.0.0/16",
		"--nodeport-addresses=0.0.0.0/0", "--conntrack-max-per-core=0", "--oom-score-adj=0")
	const healthz, check = "http://127.0.0.1:10256/healthz", "http://127.0.0.1:31900/"
	eventually(t, "it serves", func() bool {
		return log.count("level=INFO msg=synced") == 2 && strings.Contains(page(node, check), `"localEndpoints": 1`) && strings.Contains(page(node, healthz), `"healthy":true`)
	})
	end := probe(t, node, healthz, check)

	api.token.Store(new("second"))
	write("wrong")
	eventually(t, "the wrong token is rejected", func() bool { return strings.Contains(page(node, healthz), "the credentials are not accepted") })
	if n := log.count("msg=starting"); n != 1 || api.refused.Load() == 0 {
		t.Errorf("it started %d times, and %d requests were refused", n, api.refused.Load())
	}
	watches := api.watches.Load()
	write("second")
	eventually(t, "the right token takes effect", func() bool {
		return log.count("level=INFO msg=synced family=IPv4") == 2 && api.watches.Load() >= watches+4 && !strings.Contains(page(node, healthz), "configurationRejected")
	})
	if asked, failed := end(); len(failed) > 0 {
		t.Errorf("of %d probes %d were not answered with 200: %v", asked, len(failed), errors.Join(failed[:min(5, len(failed))]...))
	}
}
