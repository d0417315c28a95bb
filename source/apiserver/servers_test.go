// SPDX-License-Identifier: Apache-2.0

package apiserver

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestServers: the address of the API server is known before it gets a connection, in the
// form that packets have.
func TestServers(t *testing.T) {
	var servers Servers
	known := make(chan []netip.AddrPort, 8)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		select {
		case known <- nil:
		default:
		}
		w.Header().Set("Content-Type", "application/json")
		w.Write([]byte(`{"kind":"ServiceList","apiVersion":"v1"}`))
	}))
	defer server.Close()
	at := netip.MustParseAddrPort(server.Listener.Addr().String())
	_, port, _ := net.SplitHostPort(at.String())
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(kubeconfig, []byte(`apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "http://localhost:`+port+`"}}]
contexts: [{name: c, context: {cluster: c}}]
current-context: c
`), 0o600); err != nil {
		t.Fatal(err)
	}
	client, err := Client(ClientOptions{Kubeconfig: kubeconfig, Servers: &servers})
	if err != nil {
		t.Fatal(err)
	}
	servers.Follow(func(list []netip.AddrPort) { known <- list })
	if err := Ask(t.Context(), client); err != nil {
		t.Fatal(err)
	}
	if first := <-known; !slices.Contains(first, at) {
		t.Errorf("before the request, the servers are %v, want %s among them", first, at)
	}
	servers.Follow(func(list []netip.AddrPort) {
		if !slices.Contains(list, at) {
			t.Errorf("a later follower gets %v, want %s among them", list, at)
		}
		at = netip.AddrPort{}
	})
	if at.IsValid() {
		t.Error("a later follower gets nothing")
	}
}

// TestServersWithoutDNS: while no DNS server answers, a client connects to the addresses
// that the name had last. Another name has none.
func TestServersWithoutDNS(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	resolver := net.DefaultResolver
	defer func() { net.DefaultResolver = resolver }()
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		return nil, errors.New("no DNS server answers")
	}}
	servers := Servers{name: "api.example:6443", latest: []netip.AddrPort{netip.MustParseAddrPort(listener.Addr().String())}}
	conn, err := servers.dial(t.Context(), "tcp", "api.example:6443")
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	if conn, err := servers.dial(t.Context(), "tcp", "other.example:6443"); err == nil {
		conn.Close()
		t.Error("connected to a name whose addresses were never known")
	}
}
