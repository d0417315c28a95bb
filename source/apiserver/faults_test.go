// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// faultyServer is a server in front of which a fault can answer all requests.
type faultyServer struct {
	*server
	fault atomic.Pointer[http.HandlerFunc]
	asked atomic.Int32 // requests that the fault answered
}

func (f *faultyServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	fault := f.fault.Load()
	if fault == nil {
		f.server.ServeHTTP(w, r)
		return
	}
	f.asked.Add(1)
	(*fault)(w, r)
}

func newFaultyServer(t *testing.T) *faultyServer {
	return &faultyServer{server: &server{t: t, version: "10", feed: make(chan *watch.Event)}}
}

// refusal answers with a Status as an API server does.
func refusal(code int, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"on purpose","reason":%q,"code":%d}`, metav1.StatusReason(http.StatusText(code)), code)
	}
}

// body answers 200 with these bytes.
func body(contentType, text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		_, _ = io.WriteString(w, text)
	}
}

// broken ends the connection, after these bytes.
func broken(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		c, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			panic(err)
		}
		_, _ = io.WriteString(c, text)
		c.Close()
	}
}

// faults are the ways in which an API server fails. protobuf is the magic number of a
// protobuf answer.
var faults = map[string]http.HandlerFunc{
	"internal error":         refusal(http.StatusInternalServerError),
	"overloaded":             refusal(http.StatusTooManyRequests),
	"overloaded, for a time": refusal(http.StatusTooManyRequests, "Retry-After", "1"),
	"unavailable":            refusal(http.StatusServiceUnavailable),
	"bad gateway":            body("text/html", "<html>502 Bad Gateway</html>"),
	"timeout":                refusal(http.StatusGatewayTimeout),
	"gone":                   refusal(http.StatusGone),
	"unauthorized":           refusal(http.StatusUnauthorized),
	"forbidden":              refusal(http.StatusForbidden),
	"not found":              refusal(http.StatusNotFound),
	"empty body":             body("application/json", ""),
	"garbled JSON":           body("application/json", `{"kind":"ServiceList","apiVersion":"v1","items":[{"metadata":{"name":"x"},"spec":7}]}`),
	"half a list":            body("application/json", `{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"40"},"items":[`),
	"garbled protobuf":       body(protobuf, "k8s\x00\x0a\xff\xff\xff\xff\x0f garbage"),
	"noise":                  body("application/octet-stream", string(bytes.Repeat([]byte{0, 255, 7, 129}, 5000))),
	"connection ends":        broken(""),
	"ends in its answer":     broken("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 5000\r\n\r\n{\"kind\":\"ServiceList\","),
	"no HTTP":                broken("SSH-2.0-OpenSSH_9.2\r\n"),
}

// TestServerFaults: while the API server fails, known objects stay. When it answers again,
// the differences count.
func TestServerFaults(t *testing.T) {
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			api, sink := watchedFaultyServer(t)
			api.fault.Store(&fault)
			api.feed <- expired()
			await(t, "requests during the fault", func() bool { return api.asked.Load() >= 3 })
			if len(sink.told) > 0 {
				t.Errorf("the fault told %q", sink.take(t, len(sink.told)))
			}
			api.fault.Store(nil)
			caughtUp(t, sink)
		})
	}
}

// watched starts a source whose server has the Services a and b, and whose watch is under
// way.
func watched(t *testing.T, api *server, client kubernetes.Interface) *recorder {
	t.Helper()
	api.set("10", 0, served("a", "1", "10.96.0.1"), served("b", "2", "10.96.0.2"))
	sink := start(t, client, slog.New(slog.NewTextHandler(t.Output(), nil)))
	sink.take(t, 3)
	api.feed <- &watch.Event{Type: watch.Bookmark, Object: served("", "12", "")} // taken: the watch is under way
	return sink
}

// watchedFaultyServer has the Services a and c instead, which the source does not know yet.
func watchedFaultyServer(t *testing.T) (*faultyServer, *recorder) {
	t.Helper()
	api := newFaultyServer(t)
	h := httptest.NewServer(api)
	t.Cleanup(h.Close)
	client, err := Client(ClientOptions{Master: h.URL, QPS: 1000, Burst: 1000})
	if err != nil {
		t.Fatal(err)
	}
	sink := watched(t, api.server, client)
	api.set("20", 0, served("a", "1", "10.96.0.1"), served("c", "16", "10.96.0.3"))
	return api, sink
}

// caughtUp wants the differences between the Services a, b and the Services a, c.
func caughtUp(t *testing.T, sink *recorder) {
	t.Helper()
	want := []string{"delete Service default/b", "apply Service default/c"}
	if got := sink.take(t, 2); !slices.Equal(got, want) {
		t.Errorf("the end of the fault told %q, want %q", got, want)
	}
}

// TestWatchIsCut: watches that end at once, again and again, tell nothing and lose nothing.
func TestWatchIsCut(t *testing.T) {
	api, client := newServer(t)
	sink := watched(t, api, client)
	for range 3 {
		api.feed <- nil
	}
	api.feed <- &watch.Event{Type: watch.Deleted, Object: served("b", "13", "10.96.0.2")}
	api.feed <- nil
	api.feed <- &watch.Event{Type: watch.Added, Object: served("c", "14", "10.96.0.3")}
	caughtUp(t, sink)
}

// TestSlowServer: an answer that comes in pieces counts when it is whole.
func TestSlowServer(t *testing.T) {
	api, sink := watchedFaultyServer(t)
	slow := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("watch") != "" {
			api.server.ServeHTTP(w, r)
			return
		}
		whole := httptest.NewRecorder()
		api.server.ServeHTTP(whole, r)
		w.Header().Set("Content-Type", whole.Header().Get("Content-Type"))
		for piece := range slices.Chunk(whole.Body.Bytes(), 10) {
			time.Sleep(10 * time.Millisecond)
			_, _ = w.Write(piece)
			w.(http.Flusher).Flush()
			if len(sink.told) > 0 {
				t.Error("half an answer counts")
			}
		}
	})
	api.fault.Store(&slow)
	api.feed <- expired()
	caughtUp(t, sink)
}

// secureServer is a server with TLS. It accepts one token, or the certificates of one CA.
type secureServer struct {
	*faultyServer
	http  *httptest.Server
	token atomic.Pointer[string]
	cas   atomic.Pointer[x509.CertPool]
}

func newSecureServer(t *testing.T) *secureServer {
	s := &secureServer{faultyServer: newFaultyServer(t)}
	s.http = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if token := s.token.Load(); token != nil && r.Header.Get("Authorization") != "Bearer "+*token {
			s.asked.Add(1)
			refusal(http.StatusUnauthorized)(w, r)
			return
		}
		s.faultyServer.ServeHTTP(w, r)
	}))
	s.http.EnableHTTP2 = true
	s.http.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	s.http.TLS = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		pool := s.cas.Load()
		if pool == nil {
			return nil, nil
		}
		return &tls.Config{
			Certificates: s.http.TLS.Certificates, NextProtos: []string{"h2", "http/1.1"}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
		}, nil
	}}
	s.http.StartTLS()
	t.Cleanup(s.http.Close)
	return s
}

// client writes a kubeconfig for the server, at an address, and returns its client.
func (s *secureServer) client(at string, user clientcmdapi.AuthInfo) kubernetes.Interface {
	s.t.Helper()
	config := clientcmdapi.NewConfig()
	config.Clusters["c"] = &clientcmdapi.Cluster{
		Server: at, TLSServerName: "example.com",
		CertificateAuthorityData: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.http.Certificate().Raw}),
	}
	config.AuthInfos["u"] = &user
	config.Contexts["c"], config.CurrentContext = &clientcmdapi.Context{Cluster: "c", AuthInfo: "u"}, "c"
	path := filepath.Join(s.t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*config, path); err != nil {
		s.t.Fatal(err)
	}
	client, err := Client(ClientOptions{Kubeconfig: path, QPS: 1000, Burst: 1000})
	if err != nil {
		s.t.Fatal(err)
	}
	return client
}

// TestTokenIsRotated: a token in a file is read again when the old one is not accepted any
// more.
func TestTokenIsRotated(t *testing.T) {
	api := newSecureServer(t)
	file := filepath.Join(t.TempDir(), "token")
	write := func(token string) {
		t.Helper()
		if err := errors.Join(os.WriteFile(file+".new", []byte(token), 0o600), os.Rename(file+".new", file)); err != nil {
			t.Fatal(err)
		}
	}
	write("first")
	api.token.Store(new("first"))
	sink := watched(t, api.server, api.client(api.http.URL, clientcmdapi.AuthInfo{TokenFile: file}))
	api.set("20", 0, served("a", "1", "10.96.0.1"), served("c", "16", "10.96.0.3"))
	api.token.Store(new("second"))
	api.feed <- expired()
	await(t, "a refusal", func() bool { return api.asked.Load() > 0 })
	write("second")
	caughtUp(t, sink)
}

// TestCertificateIsRotated: a client's certificate in files is read again for a new
// connection.
func TestCertificateIsRotated(t *testing.T) {
	api := newSecureServer(t)
	dir := t.TempDir()
	api.cas.Store(writeIdentity(t, dir))
	sink := watched(t, api.server, api.client(api.http.URL, clientcmdapi.AuthInfo{ClientCertificate: filepath.Join(dir, "cert"), ClientKey: filepath.Join(dir, "key")}))
	api.set("20", 0, served("a", "1", "10.96.0.1"), served("c", "16", "10.96.0.3"))
	api.cas.Store(writeIdentity(t, dir))
	api.http.CloseClientConnections()
	api.feed <- expired()
	api.feed <- expired() // a watch of a connection that has ended may have taken the first
	caughtUp(t, sink)
}

// writeIdentity writes a key and a certificate that signs itself, and returns the pool of
// CAs that accepts it.
func writeIdentity(t *testing.T, dir string) *x509.CertPool {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "node " + serial.String()}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	err = errors.Join(os.WriteFile(filepath.Join(dir, "cert"), cert, 0o600),
		os.WriteFile(filepath.Join(dir, "key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(cert)
	return pool
}

// freezer passes connections on to a server. Connections that it has frozen stay open, and
// no byte passes any more.
type freezer struct {
	net.Listener
	to string

	mu       sync.Mutex
	frozen   bool // new connections too
	open     []*frozenConn
	accepted atomic.Int32
}

type frozenConn struct {
	net.Conn
	frozen atomic.Bool
}

// Read holds back what arrives once the connection is frozen.
func (c *frozenConn) Read(b []byte) (int, error) {
	for {
		n, err := c.Conn.Read(b)
		if err != nil || !c.frozen.Load() {
			return n, err
		}
	}
}

func newFreezer(t *testing.T, to string) *freezer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &freezer{Listener: l, to: to}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			f.accepted.Add(1)
			f.pass(c)
		}
	}()
	return f
}

func (f *freezer) pass(client net.Conn) {
	server, err := net.Dial("tcp", f.to)
	if err != nil {
		client.Close()
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	ends := []*frozenConn{{Conn: client}, {Conn: server}}
	for i, from := range ends {
		from.frozen.Store(f.frozen)
		go func() {
			_, _ = io.Copy(ends[1-i], from)
			client.Close()
			server.Close()
		}()
	}
	f.open = append(f.open, ends...)
}

// freeze freezes the open connections and, until thaw, new ones.
func (f *freezer) freeze() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.frozen = true
	for _, c := range f.open {
		c.frozen.Store(true)
	}
}

// thaw lets new connections pass. Frozen ones stay frozen.
func (f *freezer) thaw() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.frozen = false
}

// TestFrozenServer: a server that stops to answer, though its connections stay open, is
// noticed by unanswered pings. The source then connects anew.
func TestFrozenServer(t *testing.T) {
	// client-go waits 30 s and 15 s; these variables are its own.
	t.Setenv("HTTP2_READ_IDLE_TIMEOUT_SECONDS", "1")
	t.Setenv("HTTP2_PING_TIMEOUT_SECONDS", "1")
	api := newSecureServer(t)
	between := newFreezer(t, api.http.Listener.Addr().String())
	sink := watched(t, api.server, api.client("https://"+between.Addr().String(), clientcmdapi.AuthInfo{}))
	before := between.accepted.Load()
	between.freeze()
	api.set("20", 0, served("a", "1", "10.96.0.1"), served("c", "16", "10.96.0.3"))
	await(t, "a new connection", func() bool { return between.accepted.Load() > before })
	if len(sink.told) > 0 {
		t.Errorf("a frozen server told %q", sink.take(t, len(sink.told)))
	}
	between.thaw()
	api.feed <- expired()
	api.feed <- expired() // a watch of a connection that has ended may have taken the first
	caughtUp(t, sink)
}
