// SPDX-License-Identifier: Apache-2.0

package explain

import (
	"context"
	"flag"
	"fmt"
	"image/png"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/utils/ptr"

	"signalbox/internal/nstest"
	"signalbox/proxier/plan"
	"signalbox/proxier/syncer"
)

var updatePictures = flag.Bool("update", false, "write the screenshots of docs/ anew")

// page returns status and body of a page.
func page(t *testing.T, h http.Handler, path string) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil))
	if policy := w.Header().Get("Content-Security-Policy"); w.Code != http.StatusMethodNotAllowed && !strings.Contains(policy, "default-src 'none'") {
		t.Errorf("%s: the policy for its content is %q", path, policy)
	}
	return w.Code, w.Body.String()
}

// also adds a Service like the world's, with an endpoint of its own.
func (w *world) also(name string, number int, change func(*corev1.Service, *discoveryv1.Endpoint)) {
	s := &corev1.Service{ObjectMeta: *w.service.ObjectMeta.DeepCopy()}
	s.Name = name
	s.Spec.Type = corev1.ServiceTypeClusterIP
	s.Spec.ClusterIP = fmt.Sprintf("10.96.%d.%d", 1+number/250, 1+number%250)
	s.Spec.ClusterIPs = []string{s.Spec.ClusterIP}
	s.Spec.Ports = []corev1.ServicePort{{Name: "http", Protocol: corev1.ProtocolTCP, Port: 80}}
	slice := w.slice.DeepCopy()
	slice.Name, slice.Labels[discoveryv1.LabelServiceName] = name+"-1", name
	slice.Endpoints = slice.Endpoints[:1]
	slice.Endpoints[0].Addresses = []string{fmt.Sprintf("10.245.%d.%d", number/250, 1+number%250)}
	if change != nil {
		change(s, &slice.Endpoints[0])
	}
	w.others = append(w.others, s, slice)
}

func TestPage(t *testing.T) {
	w := newWorld(t)
	w.slice.Endpoints[1].Conditions = discoveryv1.EndpointConditions{Ready: ptr.To(false), Serving: ptr.To(false)}
	w.also("db", 1, func(_ *corev1.Service, e *discoveryv1.Endpoint) { e.Conditions.Ready = ptr.To(false) })
	w.others = append(w.others, w.clone("app", "10.96.0.11", "198.51.100.7")) // default/web wants the external IP, too
	h := w.served(filepath.Join(t.TempDir(), "run")).Page()
	for _, test := range []struct {
		path string
		code int
		has  []string
		not  []string
	}{
		{"/services", 200, []string{"3 Services, 1 to 3.", `<a href="/services/default/web">default/web</a>`, "<code>10.96.0.10:80/tcp</code>", "2 of 3", "0 of 1",
			"is refused: the Service has no ready endpoint; 1 is not ready."}, nil},
		{"/services?q=DB", 200, []string{"1 Services for “DB”, 1 to 1.", "default/db"}, []string{"default/web</a>"}},
		{"/services?q=203.0.113.5", 200, []string{"1 Services", "default/web"}, []string{"default/db</a>"}},
		{"/services?q=10.244.2.7:8080", 200, []string{"1 Services", "default/web"}, nil},
		{"/services?q=10.244.2.7:8080/tcp", 200, []string{"1 Services", "default/web"}, nil},
		{"/services?q=10.244.2.7:8080/udp", 200, []string{"0 Services"}, nil},
		{"/services?q=10.244.1.6", 200, []string{"1 Services", "default/web"}, nil},
		{"/services?q=10.244.1.6:8080", 200, []string{"1 Services", "default/web"}, nil},
		{"/services?q=10.244.1.6:8081", 200, []string{"0 Services"}, nil},
		{"/services?q=10.96.0.10:80/tcp", 200, []string{"1 Services", "default/web"}, nil},
		{"/services?q=node:30080", 200, []string{"1 Services", "default/web"}, nil},
		{"/services?q=node:30080/TCP", 200, []string{"1 Services", "default/web"}, nil},
		{"/services?q=node:30080/udp", 200, []string{"0 Services"}, nil},
		{"/services?q=node:80", 200, []string{"0 Services"}, nil},
		{"/services?q=192.0.2.1:30080", 200, []string{"1 Services", "default/web"}, nil},
		{"/services?q=192.0.2.9:30080", 200, []string{"0 Services"}, nil},
		{"/services?q=198.51.100.7:80", 200, []string{"2 Services", "default/web", "default/app"}, nil},
		{"/services?q=default/app", 200, []string{"1 Services", "default/app"}, []string{"default/web</a>"}},
		{"/services?q=10.244.2.7:1", 200, []string{"0 Services for “10.244.2.7:1”.</p>"}, []string{"default/web</a>"}},
		{"/services?q=" + url.QueryEscape(`"><script>alert(1)</script>`), 200, []string{"&lt;script&gt;"}, []string{"<script>"}},
		{"/services?page=99999999999999999999", 200, []string{"3 Services, 1 to 3."}, nil},
		{"/services/default/web", 200, []string{"default/web: ", "<code>10.244.1.6:8080</code>", "left out</span>: not ready", "web-2", "node port", "The kernel has this form, last written"}, nil},
		{"/services/default/none", 404, []string{"There is no Service default/none"}, nil},
	} {
		code, body := page(t, h, test.path)
		if code != test.code {
			t.Errorf("%s: status %d", test.path, code)
		}
		for _, text := range test.has {
			if !strings.Contains(body, text) {
				t.Errorf("%s lacks %q:\n%s", test.path, text, body)
			}
		}
		for _, text := range test.not {
			if strings.Contains(body, text) {
				t.Errorf("%s has %q", test.path, text)
			}
		}
	}
	r := httptest.NewRecorder()
	h.ServeHTTP(r, httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/services", nil))
	if r.Code != http.StatusMethodNotAllowed {
		t.Errorf("a POST is answered with %d", r.Code)
	}
}

// With 10,000 Services, and with 5,000 endpoints of one, a page stays small.
func TestPageIsBounded(t *testing.T) {
	w := newWorld(t)
	const services = 10_000
	for n := range services {
		w.also(fmt.Sprintf("s%05d", n), n, nil)
	}
	endpoint := w.slice.Endpoints[0]
	for n := range 5000 {
		e := *endpoint.DeepCopy()
		e.Addresses = []string{fmt.Sprintf("10.246.%d.%d", n/250, 1+n%250)}
		w.slice.Endpoints = append(w.slice.Endpoints, e)
	}
	h := w.served(filepath.Join(t.TempDir(), "run")).Page()
	const pages = services / servicesOnPage
	for _, n := range []int{1, 2, pages} {
		_, body := page(t, h, fmt.Sprintf("/services?q=s0&page=%d", n))
		first := (n - 1) * servicesOnPage
		if len(body) > 64<<10 || strings.Count(body, "<tr><td>") != servicesOnPage || !strings.Contains(body, fmt.Sprintf(`<tr><td><a href="/services/default/s%05d">`, first)) {
			t.Errorf("page %d has %d bytes:\n%s", n, len(body), body)
		}
		previous, next := fmt.Sprintf(`<a href="/services?page=%d&amp;q=s0">Previous</a>`, n-1), fmt.Sprintf(`<a href="/services?page=%d&amp;q=s0">Next</a>`, n+1)
		if strings.Contains(body, previous) != (n > 1) || strings.Contains(body, next) != (n < pages) {
			t.Errorf("page %d leads elsewhere:\n%s", n, body[strings.Index(body, "<nav>"):])
		}
	}
	if _, body := page(t, h, "/services/default/web"); len(body) > 256<<10 || !strings.Contains(body, "signalbox explain default/web") {
		t.Errorf("the page of a large Service has %d bytes", len(body))
	}
}

// While a page is made that takes long, other questions are answered.
func TestPageBetweenOthers(t *testing.T) {
	w := newWorld(t)
	for n := range servicesOnPage {
		w.also(fmt.Sprintf("s%02d", n), n, nil)
	}
	d := w.served(filepath.Join(t.TempDir(), "run"))
	var rows atomic.Int32
	after := make(chan int32, 1)
	w.asked = func(plan.ServicePortName) {
		if rows.Add(1) == 1 {
			go func() {
				_ = w.loop.Ask(t.Context(), func() { after <- rows.Load() })
			}()
		}
		time.Sleep(2 * rowsTime)
	}
	if code, body := page(t, d.Page(), "/services?q=s"); code != http.StatusOK || strings.Count(body, "<tr><td>") != servicesOnPage {
		t.Errorf("%d: %s", code, body)
	}
	if n := <-after; n >= servicesOnPage {
		t.Errorf("another question is answered after %d rows of %d", n, rows.Load())
	}
}

// A Loop that is busy or does not run makes no page hang: it says so.
func TestPageWithoutLoop(t *testing.T) {
	w := newWorld(t)
	w.start() // and nobody runs it
	d := NewDaemon("v1", time.Unix(0, 0))
	d.Follow(Subject{Environment: Environment{Node: "node1", Mode: "test"}, Loop: w.loop, Problems: func() []string { return nil }})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	r := httptest.NewRecorder()
	d.Page().ServeHTTP(r, httptest.NewRequestWithContext(ctx, http.MethodGet, "/services", nil))
	if r.Code != http.StatusServiceUnavailable || !strings.Contains(r.Body.String(), "the daemon is in a sync") {
		t.Errorf("%d: %s", r.Code, r.Body)
	}
}

// TestPageInChromium renders the pages as people see them. With -update, a picture goes
// into docs/.
func TestPageInChromium(t *testing.T) {
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("chromium is not installed (apt install chromium): the page is not rendered")
	}
	nstest.Enter(t)
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t)
	w.slice.Endpoints[1].Conditions.Ready = ptr.To(false)
	w.also("api", 1, nil)
	w.also("cache", 2, func(_ *corev1.Service, e *discoveryv1.Endpoint) {
		e.Conditions = discoveryv1.EndpointConditions{Ready: ptr.To(false), Serving: ptr.To(true), Terminating: ptr.To(true)}
	})
	w.also("db", 3, func(_ *corev1.Service, e *discoveryv1.Endpoint) { e.Conditions.Ready = ptr.To(false) })
	w.also("queue", 4, func(s *corev1.Service, _ *discoveryv1.Endpoint) { s.Spec.Ports[0].Name = "amqp" })
	d := w.served(filepath.Join(t.TempDir(), "run"))
	d.Synced(syncer.SyncReport{Family: plan.IPv4, Current: true, Totals: syncer.Totals{ServicePorts: 5}})
	server := httptest.NewServer(d.Page())
	defer server.Close()
	for _, test := range []struct {
		path, picture, text string
		height              int
	}{
		{"/services", "services.png", "5 Services, 1 to 5.", 600},
		{"/services/default/web", "", "New connections", 900},
	} {
		picture := filepath.Join(t.TempDir(), "page.png")
		run := func(more ...string) string {
			t.Helper()
			args := append([]string{"--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--user-data-dir=" + t.TempDir(), fmt.Sprintf("--window-size=1000,%d", test.height)}, more...)
			out, err := exec.CommandContext(t.Context(), chromium, append(args, server.URL+test.path)...).Output()
			if err != nil {
				t.Fatalf("%s: %v", test.path, err)
			}
			return string(out)
		}
		if dom := run("--dump-dom"); !strings.Contains(dom, test.text) {
			t.Errorf("%s: the browser has\n%s", test.path, dom)
		}
		run("--screenshot=" + picture)
		if colours := coloursOf(t, picture); colours < 10 {
			t.Errorf("%s: the picture has %d colours", test.path, colours)
		}
		if *updatePictures && test.picture != "" {
			text, err := os.ReadFile(picture)
			if err == nil {
				err = os.WriteFile(filepath.Join("../docs/pictures", test.picture), text, 0o644)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
}

// coloursOf counts the colours of a picture: an empty page has one.
func coloursOf(t *testing.T, path string) int {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	picture, err := png.Decode(f)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[[3]uint32]bool{}
	for y := picture.Bounds().Min.Y; y < picture.Bounds().Max.Y; y++ {
		for x := picture.Bounds().Min.X; x < picture.Bounds().Max.X; x++ {
			r, g, b, _ := picture.At(x, y).RGBA()
			seen[[3]uint32{r, g, b}] = true
		}
	}
	return len(seen)
}
